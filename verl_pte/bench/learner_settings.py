"""What a learner benchmark runs: one optimizer step's forward and backward, by response length and method.

Methods are those of settings.py, but the full cache is not ours: it is plain LoRA by the baseline named here. Left out:
how it is run (learner.py) and what is made of the samples (learner_report.py).
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from verl_pte.bench.settings import Settings

BASELINES = ("auto", "verl", "peft")


@dataclass(frozen=True)
class LearnerSettings(Settings):
    """One run. Raises ValueError naming the option, its value and what would be right.

    Attributes beyond or unlike those of `Settings`:
        lengths: response tokens of each sequence, one measurement each.
        num_seqs: sequences of the micro-batch.
        baseline: what runs the full cache: `verl` (its FSDP engine), `peft` (LoRA on the transformers model), or
            `auto`, which is verl where it is installed.
        checkpointing: gradient checkpointing of the baseline; on by default in verl.
        chunk_tokens: most tokens of a sequence in one call of the replay.
    """

    engine: str = "native"
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    num_seqs: int = 1
    layers: int = 4
    repeats: int = 3
    baseline: str = "auto"
    checkpointing: bool = True
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            raise ValueError(f"--baseline {self.baseline}: must be one of {', '.join(BASELINES)}")
        if self.baseline == "verl" and find_spec("verl") is None:
            raise ValueError("--baseline verl: verl is not installed; pip install 'verl-pte[verl]', or use peft")
        if self.chunk_tokens < 1:
            raise ValueError(f"--chunk-tokens {self.chunk_tokens}: must be at least 1")
        super().__post_init__()

    @property
    def runs_verl(self) -> bool:
        """Whether the baseline is verl's engine."""
        return self.baseline == "verl" or (self.baseline == "auto" and find_spec("verl") is not None)


# Two lengths of a small model. The ratio at the longer one says more: at the shorter, fixed costs weigh.
QUICK: dict[str, Any] = {
    "lengths": (1024, 4096),
    "hidden_size": 256,
    "repeats": 2,
}
