"""What the learner's samples say: medians and ratios, as a table and a plot.

A ratio is one within a turn, in which the methods ran one after another; given are the median over the turns, and the
least and greatest. Memory is what a step added to what the process held before it, and a method's figure the most of
its turns. Where a step did not fit on the GPU a row says so, and its figures are None.
"""

from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from verl_pte.bench.learner_settings import LearnerSettings
from verl_pte.bench.report import COLORS, MIB, panels
from verl_pte.bench.settings import METHODS

PAIRS = (("pte", "full"), ("pte", "lora_c"), ("lora_c", "full"))
_BYTES = ("rise_bytes", "peak_bytes", "store_bytes")
_TIMES = ("seconds", "seconds_range", "microseconds_per_token", "cpu_microseconds_per_token")
_KEYS = {"time": "seconds", "cpu_time": "cpu_seconds", "memory": "rise_bytes", "peak": "peak_bytes"}


def summarize(settings: LearnerSettings, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each length and method."""
    rows = []
    for length in settings.lengths:
        for method in METHODS:
            mine = [s for s in samples if (s["length"], s["method"]) == (length, method)]
            row = {"method": method, "length": length, "tokens": mine[0]["tokens"]}
            if any(s["out_of_memory"] for s in mine):
                rows.append(row | {"out_of_memory": True} | dict.fromkeys((*_TIMES, *_BYTES, "evictions", "calls")))
                continue
            seconds = [s["seconds"] for s in mine]
            rows.append(
                row
                | {
                    "out_of_memory": False,
                    "seconds": median(seconds),
                    "seconds_range": [min(seconds), max(seconds)],
                    "microseconds_per_token": 1e6 * median(seconds) / mine[0]["tokens"],
                    "cpu_microseconds_per_token": 1e6 * median(s["cpu_seconds"] for s in mine) / mine[0]["tokens"],
                    "rise_bytes": max(s["rise_bytes"] for s in mine),
                    "peak_bytes": max(s["peak_bytes"] for s in mine),
                    "store_bytes": mine[0].get("store_bytes"),
                    "evictions": mine[0].get("evictions"),
                    "calls": mine[0].get("calls"),
                }
            )
    return rows


def ratios(settings: LearnerSettings, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each length: of each of PAIRS, [median, least, greatest] of each quantity's ratio."""
    by = {(s["length"], s["method"], s["repeat"]): s for s in samples}
    rows = []
    for length in settings.lengths:
        row: dict[str, Any] = {"length": length}
        for mine, other in PAIRS:
            pair = {}
            for name, key in _KEYS.items():
                turns = [(by[length, mine, i], by[length, other, i]) for i in range(settings.repeats)]
                fit = not any(sample["out_of_memory"] for turn in turns for sample in turn)
                found = [a[key] / b[key] for a, b in turns if b[key] > 0] if fit else []
                pair[name] = [median(found), min(found), max(found)] if found else None
            row[f"{mine}/{other}"] = pair
        rows.append(row)
    return rows


def tables(
    settings: LearnerSettings,
    rows: list[dict[str, Any]],
    by_length: list[dict[str, Any]],
    workers: dict[str, dict[str, Any]],
) -> Group:
    """For the terminal: the methods, then their ratios."""
    model = settings.model or f"{settings.layers} layers of {settings.hidden_size}"
    steps = Table(
        title=f"learner step: {model}, {settings.num_seqs} sequences, prompts of {settings.prompt_length}, "
        f"W={settings.window}, rank {settings.rank}, {settings.dtype}",
        caption="Times are medians over the repeats, memory is the most. Rise: what a step added to what the process "
        "held; store: of it, the replay's keys and values.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("length", "method", "seconds", "us/token", "rise MiB", "peak MiB", "store MiB", "evictions", "calls"):
        steps.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        cells = ["out of memory"]
        if not row["out_of_memory"]:
            mib = ("-" if row[key] is None else f"{row[key] / MIB:.1f}" for key in _BYTES)
            counts = ("-" if row[key] is None else str(row[key]) for key in ("evictions", "calls"))
            cells = [f"{row['seconds']:.2f}", f"{row['microseconds_per_token']:.0f}", *mib, *counts]
        last = row["method"] == list(METHODS)[-1]
        steps.add_row(str(row["length"]), METHODS[row["method"]].title, *cells, end_section=last)
    compared = Table(title="ratios within a turn: median (least to greatest)", box=box.SIMPLE_HEAD)
    for name in ("length", "", "time", "CPU time", "rise", "peak"):
        compared.add_column(name, justify="left" if name == "" else "right")
    for row in by_length:
        for mine, other in PAIRS:
            pair = row[f"{mine}/{other}"]
            cells = ["-" if v is None else f"{v[0]:.2f} ({v[1]:.2f}-{v[2]:.2f})" for v in pair.values()]
            title = f"{METHODS[mine].title} / {METHODS[other].title}"
            compared.add_row(str(row["length"]), title, *cells, end_section=(mine, other) == PAIRS[-1])
    said = [
        Text(f"{METHODS[method].title}: {worker['runs']}, on {worker['device']}") for method, worker in workers.items()
    ]
    return Group(steps, compared, *said)


def draw(settings: LearnerSettings, rows: list[dict[str, Any]], path: Path) -> None:
    """Memory and time per token against the response length."""
    with panels(settings, "response tokens of a sequence", path) as (memory, time):
        for method, (title, _) in METHODS.items():
            mine = [row for row in rows if row["method"] == method and not row["out_of_memory"]]
            lengths = [row["length"] for row in mine]
            style: dict[str, Any] = {"marker": ".", "color": COLORS[method], "label": title}
            memory.plot(lengths, [row["rise_bytes"] / MIB for row in mine], **style)
            time.plot(lengths, [row["microseconds_per_token"] for row in mine], **style)
            if method == "pte":
                store = [row["store_bytes"] / MIB for row in mine]
                memory.plot(lengths, store, ":", color=COLORS[method], label="of it keys and values")
        memory.set(title="memory a step adds, MiB")
        time.set(title="time per response token, microseconds")
