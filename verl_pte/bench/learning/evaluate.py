"""Greedy accuracy under a model's own window: rollouts of the native engine on fixed examples."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from verl_pte.bench.learning.tasks import Example, Score, Task
from verl_pte.core.schedule import Schedule
from verl_pte.engine import RolloutEngine, SamplingParams

_SEED = 777  # of the examples; training draws from other streams
_ROWS = 128  # sequences decoded at once


class Accuracy(NamedTuple):
    """Means over examples."""

    answer: float
    chain: float
    early: float


def test_examples(task: Task, works: tuple[int, int], count: int) -> list[Example]:
    """The same for every method: `count` examples of `works[0]` to `works[1]` work steps."""
    generator = torch.Generator().manual_seed(_SEED)
    low, high = works
    return task.examples([low + i % (high - low + 1) for i in range(count)], generator)


def accuracy(model: nn.Module, task: Task, examples: Sequence[Example], schedule: Schedule | None = None) -> Accuracy:
    """Of greedy responses. `schedule` in place of the model's: ``full()`` asks for the full cache."""
    longest = max(len(e.thought) for e in examples) + 8  # room to be wrong in
    engine = RolloutEngine(
        model,
        max_num_seqs=min(_ROWS, len(examples)),
        max_prompt_length=task.prompt_length,
        max_response_length=longest,
        schedule=schedule,
    )
    sampling = [SamplingParams(temperature=0, max_tokens=len(e.thought) + 8) for e in examples]
    outputs = engine.generate([e.prompt for e in examples], sampling)
    return mean([task.score(e, o.token_ids) for e, o in zip(examples, outputs, strict=True)])


def mean(scores: Sequence[Score]) -> Accuracy:
    """Over examples."""
    return Accuracy(*(sum(values) / len(scores) for values in zip(*scores, strict=True)))
