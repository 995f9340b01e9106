"""Runs the learner benchmark: three methods that take turns."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from verl_pte.bench import turns
from verl_pte.bench.engines import check_attention, native_device
from verl_pte.bench.learner_settings import LearnerSettings
from verl_pte.bench.models import make_models
from verl_pte.bench.rollout import Measured
from verl_pte.bench.worker import Worker


class LearnerWorker(Worker):
    """A worker that makes a learner's step, whose replay evicts as the schedule says."""

    name: ClassVar[str] = "learner"
    program: ClassVar[str] = "verl_pte.bench.learner_worker"

    def measure(self, length: int) -> dict[str, Any]:
        """One sample, or that it does not fit on the GPU. Raises RuntimeError if the process died, or did something
        else.
        """
        sample = super().measure(length)
        if self.method != "full" and not sample["out_of_memory"]:
            prompt = self.settings.prompt_length
            # The last token is predicted and not run.
            expected = self.settings.method(self.method).schedule().num_evictions(prompt, prompt + length - 1)
            if sample["evictions"] != expected:
                raise RuntimeError(
                    f"{self.method}: {sample['evictions']} evictions, not {expected}: not what was to be measured"
                )
        return sample


def total_work(settings: LearnerSettings) -> int:
    """What `measure` reports as done when it ends: response tokens of a sequence, over all methods."""
    return turns.total_work(settings, min(settings.lengths))


def measure(settings: LearnerSettings, output: Path, progress: Callable[[str, int], None]) -> Measured:
    """Run it all; arguments and errors as of turns.py. Raises ValueError for what is not to be had here."""
    check_attention(settings, gradients=True)
    with tempfile.TemporaryDirectory(prefix="verl_pte_bench_") as folder:
        models = Path(folder)
        progress("making models", 0)
        make_models(settings, models, native_device(settings))
        shortest = min(settings.lengths)
        return Measured(*turns.take_turns(LearnerWorker, settings, models, output, shortest, progress), None)
