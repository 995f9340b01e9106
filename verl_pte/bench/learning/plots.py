"""Plots of a report: answers by method, over distance and over settings, and rewards over GRPO's steps."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_pte.bench.learning.cells import BLOCK
from verl_pte.bench.learning.methods import METHODS, pte_settings
from verl_pte.bench.learning.report import knobs, way
from verl_pte.bench.learning.tasks import DIGITS, KINDS

_COLUMNS = len(KINDS)  # of panels: most groups have one for each task
_SWEPT = ("window", "evict_fraction", "rank", "update_strength")
_SWEPT_METHODS = ("pte", "lora_c")
_COLORS = dict(zip(METHODS, [f"C{i}" for i in range(len(METHODS))], strict=True))


def draw(rows: Sequence[dict[str, Any]], window: int, folder: Path) -> list[Path]:
    """Write the plots there is something to show in, and remove others of an earlier report."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plain = [row for row in rows if row["seeds"] and not row["knobs"]]
    written = []
    figures = {
        "methods": _methods(plain),
        "distance": _distance(rows),
        "rewards": _rewards(plain),
        "sweeps": _sweeps(rows),
    }
    for name, panels in figures.items():
        path = folder / f"learning_{name}.png"
        if not panels:
            path.unlink(missing_ok=True)
            continue
        columns = min(len(panels), _COLUMNS)
        lines = -(-len(panels) // columns)
        size = (4.6 * columns + 0.6, 3.8 * lines)
        figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (heading, members) in zip(axes.flat, panels.items(), strict=False):
            _PANELS[name](axis, members, window)
            axis.set_title("\n".join(textwrap.wrap(heading, 44)), fontsize=9)
            axis.grid(alpha=0.3)
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written


def _methods(rows: Sequence[dict[str, Any]]) -> dict[str, list]:
    panels: dict[str, list] = {}
    for row in rows:
        panels.setdefault(f"{row['task']}: {way(row)}", []).append(row)
    return {heading: members for heading, members in panels.items() if len(members) > 1}


def _distance(rows: Sequence[dict[str, Any]]) -> dict[str, list]:
    panels: dict[str, list] = {}
    for row in rows:
        if row["seeds"] and row["far"]:
            heading = f"{row['task']}: {way(row)}" + (f", {knobs(row)}" if row["knobs"] else "")
            panels.setdefault(heading, []).append(row)
    return panels


def _rewards(rows: Sequence[dict[str, Any]]) -> dict[str, list]:
    return {heading: members for heading, members in _methods(rows).items() if "GRPO" in heading}


def _sweeps(rows: Sequence[dict[str, Any]]) -> dict[str, list]:
    """Rows in which a setting differs, beside those in which none does."""
    rows = [row for row in rows if row["seeds"] and row["way"] == "supervised" and row["method"] in _SWEPT_METHODS]
    panels = {}
    for knob in _SWEPT:
        tasks = {row["task"] for row in rows if knob in row["knobs"]}
        members = [r for r in rows if r["task"] in tasks and (knob in r["knobs"] or not r["knobs"])]
        if members:
            panels[knob] = sorted(members, key=lambda row: _value(row, knob))
    return panels


def _value(row: dict[str, Any], knob: str) -> Any:
    return getattr(pte_settings(row["method"], **row["knobs"]), knob)


def _bars(axis: Any, rows: list[dict[str, Any]], window: int) -> None:
    names = [METHODS[row["method"]].title for row in rows]
    values = [row["answer"]["mean"] for row in rows]
    axis.barh(names, values, xerr=[row["answer"]["half"] or 0 for row in rows], color="tab:blue", alpha=0.8)
    axis.axvline(rows[0]["full_base_answer"], color="k", linestyle=":", label="base, full cache")
    axis.axvline(1 / DIGITS, color="tab:red", linestyle=":", label="chance")
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.02), xlabel="answer accuracy")
    axis.legend(fontsize=7)


def _over_distance(axis: Any, rows: list[dict[str, Any]], window: int) -> None:
    for row in rows:
        axis.errorbar(
            [at["thought_length"] for at in row["far"]],
            [at["answer"]["mean"] for at in row["far"]],
            [at["answer"]["half"] or 0 for at in row["far"]],
            marker=".",
            capsize=2,
            color=_COLORS[row["method"]],
            label=METHODS[row["method"]].title,
        )
    ceiling = [(at["thought_length"], at["full_base_answer"]) for at in rows[0]["far"]]
    axis.plot(*zip(*ceiling, strict=True), color="k", linestyle=":", label="base, full cache")
    axis.axhline(1 / DIGITS, color="tab:red", linestyle=":", label="chance")
    axis.axvline(rows[0]["knobs"].get("window", window), color="k", linewidth=0.8, label="window")
    axis.set(xlim=(0, None), ylim=(0, 1.02), xlabel="thought tokens", ylabel="answer accuracy")
    axis.legend(fontsize=7)


def _reward_curves(axis: Any, rows: list[dict[str, Any]], window: int) -> None:
    for row in rows:
        steps = [BLOCK * (i + 1) for i in range(len(row["rewards"]))]
        axis.plot(steps, row["rewards"], color=_COLORS[row["method"]], label=METHODS[row["method"]].title)
        axis.fill_between(steps, *zip(*row["rewards_of_seeds"], strict=True), color=_COLORS[row["method"]], alpha=0.15)
    axis.set(ylim=(0, 1.02), xlabel="step", ylabel=f"reward, mean of {BLOCK} steps, and range over seeds")
    axis.legend(fontsize=7)


def _over_setting(axis: Any, rows: list[dict[str, Any]], window: int) -> None:
    knob = next(knob for knob in _SWEPT if any(knob in row["knobs"] for row in rows))
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        axis.errorbar(
            [_value(row, knob) for row in mine],
            [row["answer"]["mean"] for row in mine],
            [row["answer"]["half"] or 0 for row in mine],
            marker=".",
            capsize=2,
            color=_COLORS[method],
            label=METHODS[method].title,
        )
    axis.set(ylim=(0, 1.02), xlabel=knob, ylabel="answer accuracy")
    axis.legend(fontsize=7)


_PANELS = {"methods": _bars, "distance": _over_distance, "rewards": _reward_curves, "sweeps": _over_setting}
