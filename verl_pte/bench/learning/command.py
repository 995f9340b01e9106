"""``python -m verl_pte.bench learning``: the quick comparison, and the full report."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from verl_pte.bench import machine
from verl_pte.bench.command import draw_if_possible, print_json, reported_errors
from verl_pte.bench.learning import paired, plan, plots, report
from verl_pte.bench.learning.cells import Cell, on_file
from verl_pte.bench.learning.pool import run_all
from verl_pte.bench.learning.report import MAX_SEEDS

WINDOW = 16  # of all cells but a sweep's
_SEEDS = 3


def learning_command(
    quick: Annotated[
        bool, typer.Option("--quick", help="One task, one seed: PTE, LoRA_c and Global-Only, supervised.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(help="Of the full report. Default: 3.", show_default=False)] = None,
    only: Annotated[str, typer.Option(help="Of the full report: run the cells whose name contains this.")] = "",
    jobs: Annotated[int, typer.Option(help="Processes, of one thread each.")] = 2,
    minutes: Annotated[float | None, typer.Option(help="Begin no cell after this long. Default: no limit.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/bench/learning"),
) -> None:
    """Answer accuracy under a window, by method: small models, generated tasks, this package's engine and learner.

    Cells that OUTPUT already holds are not run again, so an interrupted report goes on where it was. Writes
    learning.json, learning.md and plots, of all cells of the plan that OUTPUT holds. With --quick the last line printed
    is one JSON object.
    """
    with reported_errors():
        if quick and (seeds is not None or only):
            raise ValueError("--quick is one task with one seed: it takes neither --seeds nor --only")
        seeds = _SEEDS if seeds is None else seeds
        if not 1 <= seeds <= MAX_SEEDS or jobs < 1:
            raise ValueError(f"--seeds {seeds}, --jobs {jobs}: must be 1 to {MAX_SEEDS}, and at least 1")
        planned = plan.quick() if quick else plan.full(seeds)
        cells = [cell for cell in planned if only in cell.name]
        if not cells:
            raise ValueError(f"--only {only}: no cell has this in its name")
    folder = output / "quick" if quick else output
    folder.mkdir(parents=True, exist_ok=True)
    console, start = Console(stderr=quick), time.perf_counter()
    reported = planned if quick else plan.full(MAX_SEEDS)
    with reported_errors():
        for cell in reported:
            on_file(cell, folder)  # what cannot be reported is said before hours of work
        found = run_all(cells, folder, jobs, console, minutes)
    write(reported, planned, folder, console)
    if quick and len(found) < len(cells):
        typer.echo(f"error: {len(cells) - len(found)} of {len(cells)} cells are missing: run it again", err=True)
        raise typer.Exit(1)
    if quick:
        verdict = _verdict(found)
        print_json(verdict | {"seconds": round(time.perf_counter() - start)})
        if "failures" in verdict:
            raise typer.Exit(1)


def write(reported: list[Cell], planned: list[Cell], folder: Path, console: Console) -> None:
    """The report of what the folder holds of `reported`, and how much of `planned` that is."""
    held = [(cell.name, known) for cell in reported if (known := on_file(cell, folder)) is not None]
    found, names = [known for _, known in held], {name for name, _ in held}
    done = sum(cell.name in names for cell in planned)
    rows, differences = report.summarize(found), paired.differences(found)
    content = {
        "machine": machine.hardware(),
        "versions": machine.versions(),
        "commits": sorted({str(cell["commit"]) for cell in found}),
        "cells": {"planned": len(planned), "done": done},
        "base": found[0]["cell"]["base"] if found else None,
        "rows": rows,
        "differences": [difference._asdict() for difference in differences],
    }
    (folder / "learning.json").write_text(json.dumps(content, indent=1) + "\n")
    parts = [
        report.markdown(rows),
        *(["Answers by tokens of the thought:\n", far] if (far := report.distances(rows)) else []),
        *(["Differences of two trainings, seed by seed:\n", paired.markdown(differences)] if differences else []),
    ]
    (folder / "learning.md").write_text("\n".join(parts))
    plot = draw_if_possible(folder, lambda path: plots.draw(rows, WINDOW, path))
    console.print(report.table(rows))
    missing = len(planned) - done
    ending = f"; {missing} of {len(planned)} cells are missing, run it again" if missing else ""
    console.print(f"report: {folder}   {plot}{ending}", soft_wrap=True, markup=False)


def _verdict(found: list[dict[str, Any]]) -> dict[str, Any]:
    failures = {c["cell"]["method"]: c["failure"] for c in found if "failure" in c}
    if failures:
        return {"failures": failures}
    answers = {cell["cell"]["method"]: round(cell["history"][-1]["answer"], 4) for cell in found}
    differences = {f"pte_minus_{m}": round(answers["pte"] - answers[m], 4) for m in answers if m != "pte"}
    return {
        "task": found[0]["cell"]["task"],
        "full_cache_base": found[0]["full_base"]["answer"],
        "answer": answers,
        **differences,
    }
