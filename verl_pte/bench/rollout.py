"""Runs the rollout benchmark: three methods in three processes that take turns, A B C A B C.

What disturbs the machine for a while then falls on all methods alike, and times can be compared within a turn. The
other two processes wait meanwhile, without using a core. Each method first generates the longest length once, untimed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from verl_pte.bench import equal_memory
from verl_pte.bench.models import make_models
from verl_pte.bench.settings import METHODS, Settings
from verl_pte.bench.worker import RolloutWorker


class Measured(NamedTuple):
    """Every sample, with its method and repeat; what each worker said of itself; rows of equal_memory.py, or None."""

    samples: list[dict[str, Any]]
    workers: dict[str, dict[str, Any]]
    equal_memory: list[dict[str, Any]] | None


def total_work(settings: Settings) -> int:
    """What `measure` reports as done when it ends: tokens generated a sequence, over all methods."""
    work = len(METHODS) * (max(settings.lengths) + settings.repeats * sum(settings.lengths))
    return work + (equal_memory.total_work(settings) if settings.equal_memory else 0)


def measure(settings: Settings, output: Path, progress: Callable[[str, int], None]) -> Measured:
    """Run it all; logs of the processes go to `output`.

    `progress` is told what begins, and how much was done since it was told last. Raises RuntimeError if a process dies
    or the engine did not do what was asked of it.
    """
    samples: list[dict[str, Any]] = []
    workers: dict[str, RolloutWorker] = {}
    said = {}
    with tempfile.TemporaryDirectory(prefix="verl_pte_bench_") as folder:
        models = Path(folder)
        progress("making models", 0)
        make_models(settings, models)
        try:
            for method, (title, _) in METHODS.items():  # one by one: on a GPU each looks at the memory that is free
                progress(f"starting {title}", 0)
                workers[method] = RolloutWorker(settings, method, models, output / f"worker-{method}.log")
                said[method] = workers[method].ready()
            done, longest = 0, max(settings.lengths)
            for method, worker in workers.items():
                progress(f"warming up {METHODS[method].title}", done)
                worker.measure(longest)
                done = longest
            for length in settings.lengths:
                for repeat in range(settings.repeats):
                    for method, worker in workers.items():
                        progress(f"{length} tokens, {repeat + 1}/{settings.repeats}, {METHODS[method].title}", done)
                        sample = worker.measure(length)
                        samples.append({"method": method, "repeat": repeat} | sample)
                        done = length
            progress("done", done)
        finally:
            for worker in workers.values():
                worker.close()
        equal = equal_memory.measure(settings, models, output, progress) if settings.equal_memory else None
    return Measured(samples, said, equal)
