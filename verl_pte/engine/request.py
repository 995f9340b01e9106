"""A sequence on its way through the engine, and what comes out of it."""

import random
from dataclasses import dataclass, field
from typing import Any

from verl_pte.engine.sampling import SamplingParams


@dataclass
class RolloutOutput:
    """One finished (or aborted) response."""

    request_id: Any
    prompt_index: int  # position of its prompt in `generate`'s list; 0 for single requests
    token_ids: list[int]  # the stop token included
    log_probs: list[float]  # of these tokens, after temperature
    finish_reason: str  # "stop", "length" or "abort"
    num_evictions: int
    peak_cache_tokens: int  # most tokens a layer held at once, pinned ones included


@dataclass
class RunningSequence:
    """State of one sequence while it waits for a row or decodes in one."""

    request_id: Any
    prompt_index: int
    prompt: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    random_stream: random.Random
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    num_evictions: int = 0
    next_eviction: int | None = None  # position at which tokens leave next

    @property
    def position(self) -> int:
        """Absolute position of the newest token, which has been sampled but not yet run."""
        return len(self.prompt) + len(self.token_ids) - 1

    def append(self, token: int, log_prob: float) -> str | None:
        """Take a sampled token; returns the finish reason, if any."""
        self.token_ids.append(token)
        self.log_probs.append(log_prob)
        if token in self.stop_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.params.max_tokens else None

    def output(self, finish_reason: str, peak_cache_tokens: int) -> RolloutOutput:
        """What the caller gets."""
        return RolloutOutput(
            self.request_id,
            self.prompt_index,
            self.token_ids,
            self.log_probs,
            finish_reason,
            self.num_evictions,
            peak_cache_tokens,
        )
