"""Runs the learner benchmark: three methods in three processes that take turns, as in rollout.py.

Each method first runs the shortest length once, untimed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_pte.bench.learner_settings import LearnerSettings
from verl_pte.bench.learner_worker import PROGRAM
from verl_pte.bench.models import make_models
from verl_pte.bench.rollout import Measured
from verl_pte.bench.settings import METHODS
from verl_pte.bench.worker import Worker


def total_work(settings: LearnerSettings) -> int:
    """What `measure` reports as done when it ends: response tokens of a sequence, over all methods."""
    return len(METHODS) * (min(settings.lengths) + settings.repeats * sum(settings.lengths))


def measure(settings: LearnerSettings, output: Path, progress: Callable[[str, int], None]) -> Measured:
    """Run it all; logs of the processes go to `output`.

    `progress` is told what begins, and how much was done since it was told last. Raises RuntimeError if a process dies
    or a replay evicted other than the schedule says.
    """
    samples: list[dict[str, Any]] = []
    workers: dict[str, Worker] = {}
    said = {}
    with tempfile.TemporaryDirectory(prefix="verl_pte_bench_") as folder:
        models = Path(folder)
        progress("making models", 0)
        make_models(settings, models)
        try:
            for method, (title, _) in METHODS.items():
                progress(f"starting {title}", 0)
                workers[method] = Worker(settings, method, models, output / f"learner-{method}.log", PROGRAM)
                said[method] = workers[method].ready()
            done = 0
            for method, worker in workers.items():
                progress(f"warming up {METHODS[method].title}", done)
                worker.measure(min(settings.lengths))
                done = min(settings.lengths)
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
    return Measured(samples, said, None)


def _check(settings: LearnerSettings, method: str, sample: dict[str, Any]) -> None:
    if method == "full":
        return
    run = settings.prompt_length + sample["length"] - 1  # the last token is predicted and not run
    expected = settings.method(method).schedule().num_evictions(settings.prompt_length, run)
    if sample["evictions"] != expected:
        raise RuntimeError(f"{method}: {sample['evictions']} evictions, not {expected}: not what was to be measured")
