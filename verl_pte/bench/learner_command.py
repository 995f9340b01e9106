"""``python -m verl_pte.bench learner``: peak memory and time of the learner's step, by method and response length.

Prints tables or, with ``--json``, one JSON object last, and writes ``learner.json`` (settings, machine, versions,
commit, every sample) and ``learner.png``.
"""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from verl_pte.bench import learner, learner_report, machine
from verl_pte.bench.configs import NAMED
from verl_pte.bench.learner_settings import BASELINES, QUICK, LearnerSettings
from verl_pte.bench.settings import DEVICES, DTYPES

_DEFAULT = LearnerSettings()
_LENGTHS = ",".join(map(str, _DEFAULT.lengths))


def _option(help: str, default: Any, *flags: str) -> Any:
    return typer.Option(*flags, help=f"{help} Default: {default}.", show_default=False)


def command(
    quick: Annotated[bool, typer.Option("--quick", help="Two lengths of a small model, in a few minutes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object last, instead of tables.")] = False,
    lengths: Annotated[str | None, _option("Response tokens, rising.", _LENGTHS)] = None,
    window: Annotated[int | None, _option("W of LoRA_c and PTE.", _DEFAULT.window)] = None,
    num_seqs: Annotated[int | None, _option("Sequences of the micro-batch.", _DEFAULT.num_seqs)] = None,
    prompt_length: Annotated[int | None, _option("Tokens of a prompt.", _DEFAULT.prompt_length)] = None,
    rank: Annotated[int | None, _option("Of the adapter.", _DEFAULT.rank)] = None,
    hidden_size: Annotated[int | None, _option("Of the random Qwen2.", _DEFAULT.hidden_size)] = None,
    layers: Annotated[int | None, _option("Of the random Qwen2.", _DEFAULT.layers)] = None,
    model: Annotated[str | None, _option(f"{', '.join(NAMED)}, or a config.json.", "the random Qwen2")] = None,
    dtype: Annotated[str | None, _option(f"{', '.join(DTYPES)}.", _DEFAULT.dtype)] = None,
    device: Annotated[str | None, _option(f"{', '.join(DEVICES)}.", _DEFAULT.device)] = None,
    threads: Annotated[int | None, _option("Of each method's process, on CPUs.", _DEFAULT.threads)] = None,
    chunk_tokens: Annotated[int | None, _option("Most tokens of a replay's call.", _DEFAULT.chunk_tokens)] = None,
    baseline: Annotated[str | None, _option(f"Full cache by: {', '.join(BASELINES)}.", _DEFAULT.baseline)] = None,
    checkpointing: Annotated[
        bool | None, _option("Of the baseline.", "--checkpointing", "--checkpointing/--no-checkpointing")
    ] = None,
    repeats: Annotated[int | None, _option("Of each measurement.", _DEFAULT.repeats)] = None,
    seed: Annotated[int | None, _option("Of weights and tokens.", _DEFAULT.seed)] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/bench"),
) -> None:
    """Memory and time of one forward and backward: LoRA with the full cache beside LoRA_c and PTE in the replay.

    Options given beside --quick replace its own.
    """
    given: dict[str, Any] = dict(window=window, num_seqs=num_seqs, prompt_length=prompt_length, rank=rank)
    given |= dict(hidden_size=hidden_size, layers=layers, model=model, dtype=dtype, device=device, threads=threads)
    given |= dict(chunk_tokens=chunk_tokens, baseline=baseline, checkpointing=checkpointing)
    given |= dict(repeats=repeats, seed=seed)
    try:
        if lengths is not None:
            given["lengths"] = _parse(lengths)
        chosen = {name: value for name, value in given.items() if value is not None}
        _run(LearnerSettings(**(QUICK if quick else {}) | chosen), output, as_json)
    except (ValueError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


def _parse(lengths: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in lengths.split(","))
    except ValueError:
        raise ValueError(f"--lengths {lengths}: must be numbers with commas between, e.g. {_LENGTHS}") from None


def _run(settings: LearnerSettings, output: Path, as_json: bool) -> None:
    if find_spec("matplotlib") is None:
        raise RuntimeError("the plot needs matplotlib: pip install 'verl-pte[docs]'")
    output.mkdir(parents=True, exist_ok=True)
    # Before the run: its own load would be counted, and a checkout may move on.
    hardware, commit = machine.hardware(), machine.commit()
    console = Console(stderr=as_json)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=learner.total_work(settings))
        measured = learner.measure(
            settings, output, lambda text, done: bar.update(task, description=text, advance=done)
        )
    rows = learner_report.summarize(settings, measured.samples)
    ratios = learner_report.ratios(settings, measured.samples)
    content = {
        "settings": dataclasses.asdict(settings),
        "machine": hardware,
        "versions": machine.versions(),
        "commit": commit,
        "workers": measured.workers,
        "baseline": measured.workers["full"]["runs"],
        "ratios": ratios,
        "summary": rows,
        "samples": measured.samples,
    }
    (output / "learner.json").write_text(json.dumps(content, indent=2) + "\n")
    learner_report.draw(settings, rows, output / "learner.png")
    if as_json:
        shown = ("settings", "machine", "versions", "commit", "baseline", "ratios", "summary")
        print(json.dumps({key: content[key] for key in shown}))
        return
    console.print(learner_report.tables(settings, rows, ratios, measured.workers))
    console.print(f"numbers: {output / 'learner.json'}   plot: {output / 'learner.png'}", soft_wrap=True)
