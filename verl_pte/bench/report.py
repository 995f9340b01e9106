"""What the samples say: medians, spreads and ratios, as a table and a plot.

A ratio of times is one within a turn, in which the methods ran one after another; given are the median over the turns,
and the least and greatest. Left out: tokens per second at equal memory (equal_memory.py).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from verl_pte.bench.settings import BASELINE, METHODS, Settings

MIB = 2**20
COLORS = {"full": "tab:gray", "lora_c": "tab:blue", "pte": "tab:orange"}


def summarize(settings: Settings, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each length and method."""
    by_turn = {(s["method"], s["length"], s["repeat"]): s for s in samples}
    rows = []
    for length in settings.lengths:
        for method in METHODS:
            mine = [s for s in samples if (s["length"], s["method"]) == (length, method)]
            times = [s["seconds"] for s in mine]

            def ratios(key: str, other: str, mine: list[dict[str, Any]] = mine, length: int = length) -> list[float]:
                return [s[key] / by_turn[other, length, s["repeat"]][key] for s in mine]

            to_baseline = ratios("seconds", BASELINE)
            rows.append(
                {
                    "method": method,
                    "length": length,
                    "tokens": mine[0]["tokens"],
                    "tokens_per_second": mine[0]["tokens"] / median(times),
                    "seconds": median(times),
                    "seconds_range": [min(times), max(times)],
                    "time_ratio": median(to_baseline),
                    "time_ratio_range": [min(to_baseline), max(to_baseline)],
                    "time_ratio_to_full": median(ratios("seconds", "full")),
                    "cpu_time_ratio": median(ratios("cpu_seconds", BASELINE)),
                    "cpu_time_ratio_to_full": median(ratios("cpu_seconds", "full")),
                    "evictions": mine[0]["evictions"],
                    "peak_cache_tokens": _largest(mine, "peak_cache_tokens"),
                    "peak_cache_blocks": _largest(mine, "peak_cache_blocks"),
                    "held_bytes": _largest(mine, "held_bytes"),
                    "allocated_bytes": _largest(mine, "allocated_bytes"),
                    "peak_memory": _largest(mine, "peak_memory"),
                    "peak_gpu_memory": _largest(mine, "peak_gpu_memory"),
                }
            )
    return rows


def memory(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each method: what it allocated for caches at most, and the greatest peaks of its process."""
    keys = ("allocated_bytes", "peak_memory", "peak_gpu_memory")
    return {
        method: {key: _largest([s for s in samples if s["method"] == method], key) for key in keys}
        for method in METHODS
    }


def time_ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """PTE's time over the baselines', by length."""
    pte = {str(row["length"]): row for row in rows if row["method"] == "pte"}
    return {
        "PTE / LoRA_c": {length: row["time_ratio"] for length, row in pte.items()},
        "PTE / full cache": {length: row["time_ratio_to_full"] for length, row in pte.items()},
    }


def tables(settings: Settings, rows: list[dict[str, Any]], of_method: dict[str, dict[str, Any]]) -> Group:
    """For the terminal: what depends on the length, then what does not."""
    baseline = METHODS[BASELINE].title
    times = Table(
        title=f"{settings.engine} rollout: {settings.num_seqs} sequences, prompts of {settings.prompt_length}, "
        f"W={settings.window}, rank {settings.rank}, {settings.dtype}"
        + (f", {settings.attention}" if settings.engine == "native" else ""),
        caption="Times are medians over the repeats. Blocks and MiB: one sequence at its peak. Peak: of the process "
        "(on a GPU, of its memory), weights and libraries included.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in (
        "length",
        "method",
        "tok/s",
        "seconds",
        "spread",
        f"/ {baseline}",
        "range",
        "/ full",
        "blocks",
        "MiB",
        "peak MiB",
    ):
        times.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        (fastest, slowest), (low, high) = row["seconds_range"], row["time_ratio_range"]
        times.add_row(
            str(row["length"]),
            METHODS[row["method"]].title,
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds']:.2f}",
            f"{(slowest - fastest) / row['seconds']:.0%}",
            f"{row['time_ratio']:.2f}",
            "" if row["method"] == BASELINE else f"{low:.2f}-{high:.2f}",
            f"{row['time_ratio_to_full']:.2f}",
            "-" if row["peak_cache_blocks"] is None else str(row["peak_cache_blocks"]),
            f"{row['held_bytes'] / MIB:.2f}",
            _mib(row["peak_memory"] if row["peak_gpu_memory"] is None else row["peak_gpu_memory"]),
            end_section=row["method"] == list(METHODS)[-1],
        )
    peaks = Table(
        caption="At all lengths. Peaks are of the whole process: libraries and weights included.", box=box.SIMPLE_HEAD
    )
    for name in ("method", "MiB for caches", "peak resident MiB", "peak GPU MiB"):
        peaks.add_column(name, justify="left" if name == "method" else "right")
    for method, values in of_method.items():
        peaks.add_row(METHODS[method].title, *map(_mib, values.values()))
    return Group(times, peaks)


def draw(
    settings: Settings, rows: list[dict[str, Any]], at_equal_memory: list[dict[str, Any]] | None, path: Path
) -> None:
    """Against the length: tokens per second, bytes per sequence, peak memory and, with its rows, equal memory."""
    with panels(settings, "tokens generated a sequence", path, 3 if at_equal_memory is None else 4) as axes:
        speed, held, peak = axes[:3]
        for method, (title, _) in METHODS.items():
            mine = [row for row in rows if row["method"] == method]
            lengths = [row["length"] for row in mine]
            style: dict[str, Any] = {"marker": ".", "color": COLORS[method], "label": title}
            if method == "pte":
                style["linestyle"] = "--"  # LoRA_c lies under it on the right
            speed.plot(lengths, [row["tokens_per_second"] for row in mine], **style)
            slowest, fastest = ([row["tokens"] / row["seconds_range"][end] for row in mine] for end in (1, 0))
            speed.fill_between(lengths, slowest, fastest, color=COLORS[method], alpha=0.15, linewidth=0)
            held.plot(lengths, [row["held_bytes"] / MIB for row in mine], **style)
            peaks = [row["peak_memory"] if row["peak_gpu_memory"] is None else row["peak_gpu_memory"] for row in mine]
            if None not in peaks:  # systems that do not tell
                peak.plot(lengths, [value / MIB for value in peaks], **style)
            fitting = [r for r in at_equal_memory or () if r["method"] == method and r["tokens_per_second"]]
            if fitting:
                axes[3].plot([r["length"] for r in fitting], [r["tokens_per_second"] for r in fitting], **style)
                axes[3].set(title=f"tokens per second, {fitting[0]['budget_bytes'] / MIB:.0f} MiB of cache")
        speed.set(title=f"tokens per second, {settings.num_seqs} sequences")
        held.set(title="cache and state of a sequence, MiB")
        peak.set(title=f"peak MiB of the {'process' if rows[0]['peak_gpu_memory'] is None else 'GPU'}")


@contextlib.contextmanager
def panels(settings: Settings, along: str, path: Path, count: int = 2) -> Iterator[Any]:
    """So many matplotlib axes over the lengths, saved to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3 if count == 3 else 2
    size = (4.8 * columns, 3.6 * (count // columns))
    figure, grid = plt.subplots(count // columns, columns, figsize=size, layout="constrained")
    drawn = grid.flatten()
    yield drawn
    for axes in drawn:
        axes.set_xticks(settings.lengths, [str(n) for n in settings.lengths], rotation=45, ha="right")
        axes.set(xlabel=along, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def result_files(output: Path, name: str, attention: str) -> tuple[Path, Path]:
    """Where numbers and plot go. Another attention has files of its own, to be compared with the default's."""
    stem = name if attention == Settings.attention else f"{name}_{attention}"
    return output / f"{stem}.json", output / f"{stem}.png"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / MIB:.1f}"


def _largest(samples: list[dict[str, Any]], key: str) -> Any:
    return max((s[key] for s in samples if s[key] is not None), default=None)
