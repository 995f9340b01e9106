"""Tokens per second at equal cache memory: as many sequences of each method as fit into one budget.

For every length and method a process of its own runs that many sequences at once, so its peak of memory is its own
too. The budget is for caches and states alone, and by default what the full cache takes for `num_seqs` sequences at
the longest length.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.table import Table

from verl_pte.bench.models import base_config
from verl_pte.bench.settings import METHODS, Settings
from verl_pte.bench.worker import RolloutWorker
from verl_pte.core.cache import BoundedCache
from verl_pte.peft import head_dim

MIB = 2**20


def budget(settings: Settings) -> int:
    """Bytes for the caches of all sequences together."""
    if settings.budget_mib is not None:
        return int(settings.budget_mib * MIB)
    return settings.num_seqs * sequence_bytes(settings, "full", max(settings.lengths))


def sequence_bytes(settings: Settings, method: str, length: int) -> int:
    """What one sequence takes of a cache made for this length: a row of the native engine, or blocks of vLLM's pool."""
    model, config = base_config(settings), settings.method(method)
    schedule, dtype = config.schedule(), getattr(torch, settings.dtype)
    if settings.engine == "native":
        return BoundedCache(
            schedule,
            num_rows=1,
            max_prompt_length=settings.prompt_length,
            max_thoughts=length,
            num_layers=model.num_hidden_layers,
            num_kv_heads=model.num_key_value_heads,
            head_dim=head_dim(model),
            rank=config.rank,
            dtype=dtype,
            device="meta",
        ).num_bytes
    token_bytes = 2 * model.num_key_value_heads * head_dim(model) * dtype.itemsize
    tokens = schedule.pinned(settings.most_tokens(method, length))  # in whole blocks
    states = 0 if config.freeze_state else config.rank**2 * torch.float32.itemsize
    return model.num_hidden_layers * (tokens * token_bytes + states)


def num_fitting(settings: Settings, method: str, length: int) -> int:
    """Sequences of a method that fit into the budget."""
    return budget(settings) // sequence_bytes(settings, method, length)


def total_work(settings: Settings) -> int:
    """What `measure` reports as done when it ends: tokens generated a sequence, over all methods."""
    return sum(
        (settings.repeats + 1) * length
        for length in settings.lengths
        for method in METHODS
        if num_fitting(settings, method, length)
    )


def measure(
    settings: Settings, models: Path, output: Path, progress: Callable[[str, int], None]
) -> list[dict[str, Any]]:
    """One row for each length and method; where not even one sequence fits, without times.

    The methods take turns. `progress` is told what begins, and how much was done since it was told last.
    """
    rows, done = [], 0
    for length in settings.lengths:
        workers: dict[str, RolloutWorker] = {}
        samples: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        try:
            for method in METHODS:
                fitting = num_fitting(settings, method, length)
                if fitting:
                    progress(f"starting {METHODS[method].title} with {fitting} sequences", done)
                    own = replace(settings, num_seqs=fitting, lengths=(length,))
                    workers[method] = RolloutWorker(own, method, models, output / f"worker-{method}-{length}.log")
                    workers[method].ready()
                    done = 0
            for repeat in range(settings.repeats + 1):
                for method, worker in workers.items():
                    title = f"equal memory, {length} tokens, {METHODS[method].title}"
                    progress(f"{title}, {repeat}/{settings.repeats}" if repeat else f"{title}, warm-up", done)
                    samples[method].append(worker.measure(length))
                    done = length
        finally:
            for worker in workers.values():
                worker.close()
        rows += [_row(settings, method, length, samples[method][1:]) for method in METHODS]
    progress("done", done)
    return rows


def _row(settings: Settings, method: str, length: int, samples: list[dict[str, Any]]) -> dict[str, Any]:
    fitting, row = num_fitting(settings, method, length), sequence_bytes(settings, method, length)
    times = [sample["tokens"] / sample["seconds"] for sample in samples]
    return {
        "method": method,
        "length": length,
        "budget_bytes": budget(settings),
        "sequence_bytes": row,
        "num_seqs": fitting,
        "cache_bytes": fitting * row,
        "tokens_per_second": median(times) if times else None,
        "tokens_per_second_range": [min(times), max(times)] if times else None,
        **{
            key: max((s[key] for s in samples if s[key] is not None), default=None)
            for key in ("peak_memory", "peak_gpu_memory")
        },
    }


def table(settings: Settings, rows: list[dict[str, Any]]) -> Table:
    """For the terminal; speeds relative to the full cache's at the same length."""
    full = {row["length"]: row["tokens_per_second"] for row in rows if row["method"] == "full"}
    out = Table(
        title=f"tokens/s at equal cache memory: {rows[0]['budget_bytes'] / MIB:.1f} MiB for all sequences together",
        caption="Peak: of the process (on a GPU, of its memory), weights and libraries included.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("length", "method", "MiB a sequence", "sequences", "tok/s", "range", "/ full", "peak MiB"):
        out.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        speed, peak, base = row["tokens_per_second"], row["peak_gpu_memory"] or row["peak_memory"], full[row["length"]]
        out.add_row(
            str(row["length"]),
            METHODS[row["method"]].title,
            f"{row['sequence_bytes'] / MIB:.2f}",
            str(row["num_seqs"]),
            "-" if speed is None else f"{speed:.0f}",
            "-" if speed is None else "{:.0f} to {:.0f}".format(*row["tokens_per_second_range"]),
            "-" if speed is None or base is None else f"{speed / base:.2f}",
            "-" if peak is None else f"{peak / MIB:.0f}",
            end_section=row["method"] == list(METHODS)[-1],
        )
    return out
