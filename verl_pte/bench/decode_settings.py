"""What the decode benchmark runs: configurations of the native engine that differ in one thing each.

Left out: how they are run (decode.py) and what is made of the times (decode_report.py).
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from verl_pte.bench.settings import Settings


class Arm(NamedTuple):
    """A title, the method of bench/settings.py whose configuration it has, and whether its adapter is switched on."""

    title: str
    method: str
    adapter: bool = True


# In the order in which they take turns.
ARMS = {
    "full": Arm("LoRA, full cache", "full"),
    "base": Arm("base, window", "lora_c", adapter=False),
    "lora_c": Arm("LoRA_c", "lora_c"),
    "pte": Arm("PTE", "pte"),
}


@dataclass(frozen=True)
class DecodeSettings:
    """One run. Raises ValueError naming the option, its value and what would be right.

    Attributes:
        sizes: of model, adapter, window and batch; its `lengths` and `engine` are not looked at.
        cycles: eviction cycles measured; one is as many steps as a sequence takes from one eviction to the next.
    """

    sizes: Settings
    cycles: int = 8

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"--cycles {self.cycles}: must be at least 1")
        if self.sizes.attention == "flex_attention":
            raise ValueError("--attention flex_attention: decode steps do not run it; measure rollout or learner")
        object.__setattr__(self, "sizes", replace(self.sizes, engine="native", lengths=(self.num_tokens,)))

    @property
    def cycle_length(self) -> int:
        """Steps of a cycle."""
        return self.sizes.method("pte").schedule().chunk

    @property
    def warm_up(self) -> int:
        """Steps before the first cycle: every sequence has filled its window, and evicted once."""
        return self.sizes.window + self.cycle_length + self.sizes.method("pte").schedule().block_size

    @property
    def num_tokens(self) -> int:
        """Tokens every sequence generates; one more than is measured, so that none ends."""
        return self.warm_up + self.cycles * self.cycle_length + 2

    @property
    def prompt_lengths(self) -> list[int]:
        """Of each sequence: different, so that they evict at different steps, as in rollouts.

        They spread over half a block and no cycle is shorter than one, so some steps are without evictions.
        """
        half = max(1, self.sizes.method("pte").schedule().block_size >> 1)
        return [max(1, self.sizes.prompt_length - i % half) for i in range(self.sizes.num_seqs)]


# Sizes of a run that takes less than a minute.
QUICK: dict[str, Any] = {
    "window": 64,
    "num_seqs": 4,
    "prompt_length": 32,
    "rank": 16,
    "hidden_size": 256,
    "layers": 4,
}
QUICK_CYCLES = 10
