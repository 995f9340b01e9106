"""What the times of decode steps say: the parts of a step, and ratios, as a table and a plot.

Of each cycle and configuration: the median of the steps in which no row evicts, and of those in which some do; a mean
step has them in the proportion in which they occurred. Parts are differences between configurations within a cycle,
and add up to a mean step of PTE. Medians over the cycles are given, with the least and greatest.
"""

from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from verl_pte.bench.decode_settings import ARMS, DecodeSettings

PARTS = {
    "base": "base without adapter, no evictions",
    "adapter": "LoRA_c - base: products with lora_A and lora_B",
    "state product": "PTE - LoRA_c, no evictions: products with the state",
    "state update": "encode and accumulate, spread over all steps",
    "eviction": "slots and mask, spread over all steps",
}
RATIOS = {
    "PTE / LoRA_c": ("pte", "lora_c"),
    "LoRA_c / base": ("lora_c", "base"),
    "PTE / full cache": ("pte", "full"),
    "LoRA_c / full cache": ("lora_c", "full"),
}
COLORS = dict(zip(PARTS, ("tab:gray", "tab:blue", "tab:orange", "tab:red", "tab:green"), strict=True))


def summarize(settings: DecodeSettings, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of steps and parts, and ratios: each ``{"median", "range"}`` over the cycles."""
    by_cycle = [{r["arm"]: _step(r, "seconds") for r in records if r["cycle"] == i} for i in range(settings.cycles)]
    cpu_by_cycle = [
        {r["arm"]: _step(r, "cpu_seconds") for r in records if r["cycle"] == i} for i in range(settings.cycles)
    ]
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    for steps in by_cycle:
        base, lora_c, pte = steps["base"], steps["lora_c"], steps["pte"]
        eviction = lora_c["mean"] - lora_c["quiet"]
        values = (
            base["quiet"],
            lora_c["quiet"] - base["quiet"],
            pte["quiet"] - lora_c["quiet"],
            pte["mean"] - pte["quiet"] - eviction,
            eviction,
        )
        for part, value in zip(PARTS, values, strict=True):
            parts[part].append(value)
    evicting = [flag for r in records if r["arm"] == "pte" for flag in r["evicting"]]
    step_ms = {
        name: {kind: _spread([steps[name][kind] for steps in by_cycle]) for kind in ("quiet", "evicting", "mean")}
        for name in ARMS
    }
    return {
        "step_ms": step_ms,
        "parts_ms": {part: _spread(ms) for part, ms in parts.items()},
        "ratios": _ratios(by_cycle),
        "cpu_ratios": _ratios(cpu_by_cycle),
        "steps_with_evictions": sum(evicting) / len(evicting),
        "tokens_per_second": {name: settings.sizes.num_seqs / step_ms[name]["mean"]["median"] * 1e3 for name in ARMS},
    }


def _step(record: dict[str, Any], key: str) -> dict[str, float]:
    """Milliseconds of a step with and without evictions and on average; where one kind is missing, of the other."""
    pairs = list(zip(record[key], record["evicting"], strict=True))
    kinds = {kind: [s for s, evicting in pairs if evicting == kind] for kind in (False, True)}
    quiet, evicting = (1e3 * median(kinds[kind] or record[key]) for kind in (False, True))
    share = len(kinds[True]) / len(pairs)
    return {"quiet": quiet, "evicting": evicting, "mean": (1 - share) * quiet + share * evicting}


def _ratios(by_cycle: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    return {
        name: _spread([steps[over]["mean"] / steps[under]["mean"] for steps in by_cycle])
        for name, (over, under) in RATIOS.items()
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": median(values), "range": [min(values), max(values)]}


def tables(settings: DecodeSettings, summary: dict[str, Any]) -> Group:
    """For the terminal: steps of each configuration, parts of a step of PTE, ratios."""
    sizes = settings.sizes
    steps = Table(
        title=f"one decode step: {sizes.num_seqs} sequences, W={sizes.window}, rank {sizes.rank}, {sizes.dtype}, "
        f"{sizes.attention}; milliseconds",
        caption=f"Medians over {settings.cycles} eviction cycles. Some row evicts in "
        f"{summary['steps_with_evictions']:.0%} of the steps; the full cache grows from {settings.warm_up} to "
        f"{settings.num_tokens} thought tokens meanwhile.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("", "no evictions", "evictions", "mean", "range", "tok/s"):
        steps.add_column(name, justify="right" if name else "left")
    for name, arm in ARMS.items():
        kinds = summary["step_ms"][name]
        steps.add_row(
            arm.title,
            f"{kinds['quiet']['median']:.3f}",
            "-" if name == "full" else f"{kinds['evicting']['median']:.3f}",
            f"{kinds['mean']['median']:.3f}",
            _range(kinds["mean"], 3),
            f"{summary['tokens_per_second'][name]:.0f}",
        )
    parts = Table(title="parts of a mean step of PTE, milliseconds", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("part", "median", "range", "share", "what"):
        parts.add_column(name, justify="left" if name in ("part", "what") else "right")
    whole = summary["step_ms"]["pte"]["mean"]["median"]
    for part, spread in summary["parts_ms"].items():
        share = f"{spread['median'] / whole:.1%}"
        parts.add_row(part, f"{spread['median']:.3f}", _range(spread, 3), share, PARTS[part])
    ratios = Table(title="ratios of mean steps", box=box.SIMPLE_HEAD)
    for name in ("", "time", "range", "processor time", "range"):
        ratios.add_column(name, justify="right" if name else "left")
    for name, spread in summary["ratios"].items():
        cpu = summary["cpu_ratios"][name]
        ratios.add_row(name, f"{spread['median']:.3f}", _range(spread, 3), f"{cpu['median']:.3f}", _range(cpu, 3))
    return Group(steps, parts, ratios)


def _range(spread: dict[str, Any], digits: int) -> str:
    low, high = spread["range"]
    return f"{low:.{digits}f} to {high:.{digits}f}"


def draw(settings: DecodeSettings, summary: dict[str, Any], path: Path) -> None:
    """A stacked bar for each bounded configuration; the full cache's step as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    held = {
        "base": ("base", "eviction"),
        "lora_c": ("base", "adapter", "eviction"),
        "pte": tuple(PARTS),
    }
    for place, names in enumerate(held.values()):
        bottom = 0.0
        for part in PARTS:
            if part in names:
                height = max(0.0, summary["parts_ms"][part]["median"])  # a difference may be below zero by noise
                axes.bar(place, height, 0.6, bottom, color=COLORS[part], label=part if place == 2 else None)
                bottom += height
    full = summary["step_ms"]["full"]["mean"]["median"]
    axes.axhline(full, color="black", linestyle=":", linewidth=1, label=ARMS["full"].title)
    axes.set_xticks(range(len(held)), [ARMS[name].title for name in held])
    axes.set(ylabel="milliseconds", title=f"one decode step, {settings.sizes.num_seqs} sequences")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
