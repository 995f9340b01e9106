"""What an evaluation consists of: items, how each is seeded, and what is kept of it.

An item is one sample of one row of a data set, under one window, with one budget of tokens. Its seed depends on the
run's seed, the row and the sample alone: not on what shares its batch, on what was done before a kill, nor on window
and budget. Responses with the same seed and window but different budgets therefore begin with the same tokens, and only
the longest is generated; `cut` gives the others exactly, because no token depends on the budget.
"""

import random
from dataclasses import replace
from typing import NamedTuple

from verl_pte.core.schedule import Schedule
from verl_pte.engine import RolloutOutput


class Item(NamedTuple):
    """Names one result."""

    data: str  # name of the data set
    row: int  # in its data set, from 0
    sample: int  # from 0
    window: int | None  # None is the full cache
    max_tokens: int


class Record(NamedTuple):
    """A line of items.jsonl: an item, and what came of it."""

    data: str
    row: int
    sample: int
    window: int | None
    max_tokens: int
    tokens: int  # of the response, the stop token included
    finish_reason: str  # "stop" or "length"
    num_evictions: int
    peak_cache_tokens: int  # most tokens a layer held at once, pinned ones included
    answer: str | None  # what was graded, where the score is from one
    score: float
    unparsed: bool  # no answer was found or understood
    text: str | None  # the response, if it is to be kept

    @property
    def item(self) -> Item:
        """Whose record this is."""
        return Item(self.data, self.row, self.sample, self.window, self.max_tokens)


def item_seed(seed: int, row: int, sample: int) -> int:
    """Of the random stream of a response."""
    return random.Random(f"evaluate {seed} {row} {sample}").getrandbits(62)


def cut(output: RolloutOutput, max_tokens: int, prompt_len: int, schedule: Schedule) -> RolloutOutput:
    """The response a budget of `max_tokens` would have given, from one of the same seed with a larger budget."""
    if len(output.token_ids) <= max_tokens:
        return output
    run = prompt_len + max_tokens - 1  # the last token is sampled, not run
    limit = schedule.cache_limit(prompt_len)
    return replace(
        output,
        token_ids=output.token_ids[:max_tokens],
        log_probs=output.log_probs[:max_tokens],
        finish_reason="length",
        num_evictions=schedule.num_evictions(prompt_len, run),
        peak_cache_tokens=run if limit is None else min(run, limit),
    )
