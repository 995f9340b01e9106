"""The closing table of an evaluation."""

from typing import Any

from rich import box
from rich.table import Table

_NUMBERS = ("tokens", "trun-\ncated", "un-\nparsed", "evic-\ntions", "peak\ncache")


def scores_table(summary: dict[str, Any]) -> Table:
    """pass@1 and pass@k of the largest k with their intervals, in per cent; what was generated and held beside them."""
    ks = list(summary["cells"][0]["pass"])
    shown = [ks[0]] if len(ks) == 1 else [ks[0], ks[-1]]
    rows = sum(summary["rows"].values())
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=f"{rows} rows, n={summary['n']}. Shares in %; [95 % bootstrap intervals over rows].",
        caption_justify="left",
    )
    for name in ("data", "window", "max\ntokens", *(f"pass@{k}" for k in shown), *_NUMBERS):
        # On 80 columns intervals go to a second line, and nothing is cut off.
        table.add_column(name, justify="left" if name == "data" else "right", overflow="fold", min_width=6)
    for cell in summary["cells"]:
        table.add_row(*_head(cell["data"], cell, shown), *_facts(cell))
    for cell in summary.get("mean_of_sets", []):
        table.add_row(*_head("mean of sets", cell, shown))
    return table


def _head(name: str, cell: dict[str, Any], shown: list[str]) -> list[str]:
    window = "full" if cell["window"] is None else str(cell["window"])
    return [name, window, str(cell["max_tokens"]), *(_percent(cell["pass"][k]) for k in shown)]


def _percent(value: dict[str, float]) -> str:
    return rf"{100 * value['mean']:.1f} \[{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _facts(cell: dict[str, Any]) -> list[str]:
    return [
        f"{cell['tokens']['mean']:.0f}",
        f"{100 * cell['truncated']:.1f}",
        f"{100 * cell['unparsed']:.1f}",
        f"{cell['evictions']['mean']:.1f}",
        str(cell["peak_cache_tokens"]["max"]),
    ]
