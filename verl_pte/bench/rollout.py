"""Runs the rollout benchmark: three methods in three processes that take turns, A B C A B C.

What disturbs the machine for a while then falls on all methods alike, and times can be compared within a turn. The
other two processes wait meanwhile, without using a core. Each method first generates the longest length once, untimed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from verl_pte.bench.models import make_models
from verl_pte.bench.settings import METHODS, Settings
from verl_pte.bench.worker import Worker


class Measured(NamedTuple):
    """Every sample, with its method and repeat; and what each worker said of itself."""

    samples: list[dict[str, Any]]
    workers: dict[str, dict[str, Any]]


def total_work(settings: Settings) -> int:
    """What `measure` reports as done when it ends: tokens generated a sequence, over all methods."""
    return len(METHODS) * (max(settings.lengths) + settings.repeats * sum(settings.lengths))


def measure(settings: Settings, output: Path, progress: Callable[[str, int], None]) -> Measured:
    """Run it all; logs of the processes go to `output`.

    `progress` is told what begins, and how much was done since it was told last. Raises RuntimeError if a process dies
    or the engine did not do what was asked of it.
    """
    samples: list[dict[str, Any]] = []
    workers: dict[str, Worker] = {}
    said = {}
    with tempfile.TemporaryDirectory(prefix="verl_pte_bench_") as folder:
        models = Path(folder)
        progress("making models", 0)
        make_models(settings, models)
        try:
            for method, (title, _) in METHODS.items():  # one by one: on a GPU each looks at the memory that is free
                progress(f"starting {title}", 0)
                workers[method] = Worker(settings, method, models, output / f"worker-{method}.log")
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
                        _check(settings, method, sample)
                        samples.append({"method": method, "repeat": repeat} | sample)
                        done = length
            progress("done", done)
        finally:
            for worker in workers.values():
                worker.close()
    return Measured(samples, said)


def _check(settings: Settings, method: str, sample: dict[str, Any]) -> None:
    asked, bound = settings.num_seqs * sample["length"], settings.most_tokens(method, sample["length"])
    if sample["tokens"] != asked or sample["peak_cache_tokens"] > bound or sample["preemptions"]:
        raise RuntimeError(
            f"{method}: {sample['tokens']} tokens generated of {asked}, {sample['peak_cache_tokens']} held at once of "
            f"{bound} allowed, {sample['preemptions']} preemptions: not what was to be measured"
        )
