"""Figures of an evaluation, if matplotlib is installed: accuracy over windows and over budgets, and lengths.

A sweep of one value makes no figure.
"""

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from verl_pte.eval.items import Record

_BINS = 40


def plot(summary: dict[str, Any], records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw into `folder` what there is to draw; nothing without matplotlib. Returns the files."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    cells = summary["cells"]
    files = [_lengths(records, folder / "lengths.png")]
    if len({cell["window"] for cell in cells}) > 1:
        files.append(_sweep(cells, "window", "max_tokens", "window, tokens", folder / "accuracy_over_window.png"))
    if len({cell["max_tokens"] for cell in cells}) > 1:
        files.append(
            _sweep(cells, "max_tokens", "window", "longest response, tokens", folder / "accuracy_over_length.png")
        )
    return files


def _name(value: int | None) -> str:
    return "full" if value is None else str(value)


def _sweep(cells: list[dict[str, Any]], over: str, other: str, label: str, target: Path) -> Path:
    """pass@1 with its interval over one setting, a line for each data set and value of the other setting."""
    places = list(dict.fromkeys(cell[over] for cell in cells))  # cells are sorted
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    others = {cell[other] for cell in cells}
    for cell in cells:
        lines[cell["data"] + (f", {other.replace('_', ' ')} {_name(cell[other])}" if len(others) > 1 else "")].append(
            cell
        )

    def draw(axes: Any) -> None:
        for i, (name, found) in enumerate(lines.items()):
            passes = [cell["pass"]["1"] for cell in found]
            mean = [100 * value["mean"] for value in passes]
            below = [100 * (value["mean"] - value["low"]) for value in passes]
            above = [100 * (value["high"] - value["mean"]) for value in passes]
            beside = 0.04 * (i - (len(lines) - 1) / 2)  # so that intervals do not cover each other
            x = [places.index(cell[over]) + beside for cell in found]
            axes.errorbar(x, mean, yerr=[below, above], marker="o", capsize=3, label=name)
        axes.set_xticks(range(len(places)), [_name(place) for place in places])
        axes.set(xlabel=label, ylabel="pass@1, %")
        axes.legend(fontsize="small")

    return _save(draw, target)


def _lengths(records: Iterable[Record], target: Path) -> Path:
    """Histogram of response lengths under the longest budget, a line for each window."""
    tokens: dict[int | None, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        tokens[record.window][record.max_tokens].append(record.tokens)

    def draw(axes: Any) -> None:
        for window in sorted(tokens, key=lambda w: (w is None, w)):
            longest = max(tokens[window])
            label = "full cache" if window is None else f"window {window}"
            axes.hist(tokens[window][longest], bins=_BINS, range=(0, longest), histtype="step", label=label)
        axes.set(xlabel="response, tokens", ylabel="responses")
        axes.legend(fontsize="small")

    return _save(draw, target)


def _save(draw: Callable[[Any], None], target: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=150)
    return target
