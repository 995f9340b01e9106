"""What a step of a warm start does, as functions of its number: prompts, seeds of the answers, learning rate.

Nothing is drawn from a generator that remembers, so a run that was stopped and goes on does what it would have done.
"""

import math
import random
from dataclasses import dataclass
from functools import lru_cache

FINAL_LR = 0.1  # of the peak


@dataclass(frozen=True)
class Plan:
    """Steps are counted from 0. The prompts are gone through in a new order each time round."""

    num_prompts: int
    batch_size: int
    steps: int
    lr: float
    warmup_steps: int
    seed: int

    def batch(self, step: int) -> list[int]:
        """Indices of the step's prompts."""
        first = step * self.batch_size
        places = (divmod(place, self.num_prompts) for place in range(first, first + self.batch_size))
        return [_order(self.seed, round_, self.num_prompts)[index] for round_, index in places]

    def answer_seed(self, step: int, index: int) -> int:
        """Of the answer to the step's prompt number `index`."""
        return random.Random(f"answer {self.seed} {step} {index}").getrandbits(62)

    def learning_rate(self, step: int) -> float:
        """A linear rise over the warm-up, then a cosine to 10 %."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.steps - 1 - self.warmup_steps, 1)
        return self.lr * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * done)))


@lru_cache(maxsize=2)
def _order(seed: int, round_: int, num_prompts: int) -> tuple[int, ...]:
    order = list(range(num_prompts))
    random.Random(f"order {seed} {round_}").shuffle(order)
    return tuple(order)
