"""What the cells say: means over seeds with intervals, as tables and plots.

An interval is Student's 95 % interval of the mean over seeds; with one seed there is none. It covers the choice of
adapter, examples and samples. It does not cover the tests, which all seeds share, nor the base, which they share where
they ran on one machine; `bases` of a row says which they had (empty: not recorded, and counted as one base more).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.table import Table

from verl_pte.bench.learning.cells import BLOCK, Cell
from verl_pte.bench.learning.methods import METHODS

_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by number of seeds
MAX_SEEDS = max(_T95)
_TRAINING = ("way", "warm", "steps", "lr", "cosine", "encoder_lr", "kl", "full_reference", "rewarded", "works")
_KEYS = ("task", "method", "knobs", *_TRAINING)
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Cell)}  # of settings that were no settings yet
WAYS = {"supervised": "supervised", "distilled": "warm start", "grpo": "GRPO", "main_ppo": "GRPO in verl"}


def summarize(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each group of cells that differ in their seed alone."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in found:
        groups[str(setting(cell))].append(cell)
    rows = []
    for cells in groups.values():
        good = [c for c in cells if "failure" not in c]
        row = setting(cells[0]) | {
            "seeds": sorted(c["cell"]["seed"] for c in good),
            "failures": [c["failure"] for c in cells if "failure" in c],
            "bases": sorted({c.get("base_digest") or "" for c in good}),
        }
        if good:
            for key in ("answer", "chain"):
                row[f"{key}_before"] = interval([c["history"][0][key] for c in good])
                row[key] = interval([c["history"][-1][key] for c in good])
                row[f"full_base_{key}"] = mean(c["full_base"][key] for c in good)
                row[f"window_base_{key}"] = mean(c["window_base"][key] for c in good)
            row["early"] = _mean_or_none([c["history"][-1].get("early") for c in good])
            row["history"] = [
                {"step": at[0]["step"], "answer": interval([h["answer"] for h in at])}
                for at in zip(*(c["history"] for c in good), strict=True)
            ]
            fars = [{at["work"]: at for at in c["far"]} for c in good]
            row["far"] = [
                {"work": work, "thought_length": fars[0][work]["thought_length"]}
                | {"full_base_answer": mean(far[work]["full_base_answer"] for far in fars)}
                | {key: interval([far[work][key] for far in fars]) for key in ("answer", "chain")}
                | {"early": _mean_or_none([far[work].get("early") for far in fars])}
                for work in fars[0]
                if all(work in far for far in fars)
            ]
            if all(curves := [rewards(c) for c in good]):
                row["reward"] = interval([end_reward(curve) for curve in curves])
                row["rewards"] = [mean(at) for at in zip(*curves, strict=True)]
                row["rewards_of_seeds"] = [[min(at), max(at)] for at in zip(*curves, strict=True)]
                measured = [step["mismatch"] for c in good for step in c["curve"] if "mismatch" in step]
                row["mismatch_max"] = max(measured, default=None)
        rows.append(row)
    return rows


def setting(found: dict[str, Any]) -> dict[str, Any]:
    """Of what a cell found: all that is the same for the seeds of a row."""
    values = {key: found["cell"].get(key, _DEFAULTS[key]) for key in _KEYS}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}  # as in a file


def rewards(found: dict[str, Any]) -> list[float]:
    """Of a cell's blocks of steps; none if it was paid none."""
    return [step["reward"] for step in found["curve"] if "reward" in step]


def end_reward(curve: Sequence[float]) -> float:
    """Mean over the last 20 steps."""
    return mean(curve[-20 // BLOCK :])


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    """None where an older cell did not record it."""
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half the width of its 95 % interval."""
    half = _T95[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": mean(values), "half": half}


def show(value: dict[str, float | None] | None) -> str:
    """As in tables."""
    if value is None:
        return "-"
    return f"{value['mean']:.3f}" + ("" if value["half"] is None else f" ± {value['half']:.3f}")


def title(row: dict[str, Any]) -> str:
    """Of a row: its method, and what else is special about it."""
    return METHODS[row["method"]].title + (f" ({knobs(row)})" if row["knobs"] else "")


def knobs(row: dict[str, Any]) -> str:
    """Of a row: the settings that differ from its method's."""
    return ", ".join(f"{name} {value}" for name, value in row["knobs"].items())


def way(row: dict[str, Any]) -> str:
    """How a row was trained."""
    if row["way"] in ("supervised", "distilled"):
        low, high = row["works"]
        usual = (low, high) == _DEFAULTS["works"]
        return f"{WAYS[row['way']]}, {row['steps']} steps" + ("" if usual else f" on {low} to {high} steps of work")
    start = f"after {row['warm']} steps of warm start" if row["warm"] else "from scratch"
    parts = [f"{WAYS[row['way']]} {start}: {row['steps']} steps", f"lr {row['lr']:g}"]
    if not row["cosine"]:
        parts.append("constant")
    if row["encoder_lr"] != 1:
        parts.append(f"encoder's {row['encoder_lr']:g} times")
    if row["kl"]:
        parts.append(f"KL {row['kl']:g}" + ("" if row["full_reference"] else " to the base under the window"))
    if not row["rewarded"]:
        parts.append("no reward")
    return ", ".join(parts)


_COLUMNS = ("seeds", "before", "answer", "early", "chain", "reward")


def _measured(row: dict[str, Any]) -> list[str]:
    """A row's columns; `early`, the share of answers that came before the work was done, older cells did not record."""
    early = "-" if row["early"] is None else f"{row['early']:.3f}"
    before, answer, chain, reward = (show(row.get(key)) for key in ("answer_before", "answer", "chain", "reward"))
    return [_seeds(row), before, answer, early, chain, reward]


def _seeds(row: dict[str, Any]) -> str:
    bases = len(row["bases"])
    return str(len(row["seeds"])) + (f", {bases} bases" if bases > 1 else "")


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal."""
    out = Table(caption="Greedy answers under the method's window; ±: 95 % interval over seeds.", box=box.SIMPLE_HEAD)
    for name in ("task", "training", "method", *_COLUMNS):
        out.add_column(name, justify="left" if name in ("task", "training", "method") else "right")
    for row in rows:
        if row["failures"]:
            out.add_row(row["task"], way(row), title(row), f"{len(row['failures'])} failed")
        if row["seeds"]:
            out.add_row(row["task"], way(row), title(row), *_measured(row))
    return out


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same table for a document."""
    lines = [f"| {' | '.join(('task', 'training', 'method', *_COLUMNS))} |", "|---" * (3 + len(_COLUMNS)) + "|"]
    for row in rows:
        if row["seeds"]:
            lines.append("| " + " | ".join([row["task"], way(row), title(row), *_measured(row)]) + " |")
        for failure in row["failures"]:
            lines.append(
                f"| {row['task']} | {way(row)} | {title(row)} | failed | {failure}" + " |" * (len(_COLUMNS) - 1)
            )
    return "\n".join(lines) + "\n"


def distances(rows: Sequence[dict[str, Any]]) -> str:
    """Tables of the further tests, for a document: answers over the tokens of the thought, a table for each task."""
    tables = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task and row.get("far")]
        if not mine:
            continue
        lengths = sorted({at["thought_length"] for row in mine for at in row["far"]})
        lines = [f"| {task} | method | {' | '.join(map(str, lengths))} |", "|---" * (2 + len(lengths)) + "|"]
        for row in mine:
            shown = {at["thought_length"]: _tested(at) for at in row["far"]}
            lines.append(f"| {way(row)} | {title(row)} | {' | '.join(shown.get(n, '') for n in lengths)} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _tested(at: dict[str, Any]) -> str:
    return show(at["answer"]) + (f" ({at['early']:.2f} early)" if (at["early"] or 0) >= 0.005 else "")
