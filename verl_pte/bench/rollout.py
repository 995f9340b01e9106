"""Runs the rollout benchmark: three methods that take turns, then, if asked, each at the same memory."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from verl_pte.bench import equal_memory, turns
from verl_pte.bench.engines import check_attention, native_device
from verl_pte.bench.models import make_models
from verl_pte.bench.settings import Settings
from verl_pte.bench.worker import RolloutWorker


class Measured(NamedTuple):
    """Every sample, with its method and repeat; what each worker said of itself; rows of equal_memory.py, or None."""

    samples: list[dict[str, Any]]
    workers: dict[str, dict[str, Any]]
    equal_memory: list[dict[str, Any]] | None


def total_work(settings: Settings) -> int:
    """What `measure` reports as done when it ends: tokens generated a sequence, over all methods."""
    work = turns.total_work(settings, _warm_up(settings))
    return work + (equal_memory.total_work(settings) if settings.equal_memory else 0)


def measure(settings: Settings, output: Path, progress: Callable[[str, int], None]) -> Measured:
    """Run it all; arguments and errors as of turns.py. Raises ValueError for what is not to be had here."""
    check_attention(settings, gradients=False)
    with tempfile.TemporaryDirectory(prefix="verl_pte_bench_") as folder:
        models = Path(folder)
        progress("making models", 0)
        make_models(settings, models, "cpu" if settings.engine == "vllm" else native_device(settings))
        samples, workers = turns.take_turns(RolloutWorker, settings, models, output, _warm_up(settings), progress)
        equal = equal_memory.measure(settings, models, output, progress) if settings.equal_memory else None
    return Measured(samples, workers, equal)


def _warm_up(settings: Settings) -> int:
    """vLLM compiles for shapes that only the longest run may meet; the native engine makes all anew for each length."""
    return max(settings.lengths) if settings.engine == "vllm" else min(settings.lengths)
