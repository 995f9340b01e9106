"""When which token leaves the cache: the eviction schedule, in integers.

The one place that knows. The rollout engines, the learner, the vLLM scheduler and the oracle ask this module, so a
rollout and its replay cannot disagree about the visible window. Pure arithmetic on prompt length, absolute position,
window, eviction fraction and block size; no tensors, no state.

Positions are absolute (0 is the first prompt token). The *thought offset* ``u = position - pinned`` counts the
evictable tokens: ``u < 0`` is pinned. Evictions happen when offsets ``W, W + C, W + 2C, ...`` arrive, oldest ``C``
first (paper, section 3: "when the cache is full"; which share leaves is its eviction ratio).

Left out: slots and block tables. Where a token lies in memory is the cache's business.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple


class Chunk(NamedTuple):
    """A run of tokens processed in one call: never crosses an eviction boundary."""

    start: int  # absolute position of the first token
    end: int  # one past the last
    segment: int  # all its tokens see the window and the thought state of this segment
    evicted: tuple[int, int] | None  # positions leaving just before `start`, or None


@dataclass(frozen=True)
class Schedule:
    """Eviction schedule of one window setting.

    Args:
        window: thought tokens held beyond the pinned ones (W); None never evicts.
        evict_fraction: share of the window that leaves at once, in (0, 1).
        block_size: cache block in tokens; pinned lengths and evictions are aligned to it.
    """

    window: int | None
    evict_fraction: float = 0.25
    block_size: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size={self.block_size!r}: must be a positive integer")
        if not isinstance(self.evict_fraction, (int, float)) or not 0.0 < self.evict_fraction < 1.0:
            raise ValueError(f"evict_fraction={self.evict_fraction!r}: must lie strictly between 0 and 1, e.g. 0.25")
        if self.window is None:
            return
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window={self.window!r}: must be a positive integer, or null for the full cache")
        if self.window % self.block_size:
            below = self.window // self.block_size * self.block_size
            near = [str(w) for w in (below, below + self.block_size) if w > 0]
            raise ValueError(
                f"window={self.window}: must be a multiple of block_size={self.block_size}, e.g. {' or '.join(near)}"
            )

    @property
    def chunk(self) -> int:
        """Tokens evicted at once (C): ``ceil(evict_fraction * W)`` rounded up to the block size; 0 without a window."""
        if self.window is None:
            return 0
        return self._round_up(math.ceil(self.evict_fraction * self.window))

    def pinned(self, prompt_len: int) -> int:
        """Tokens never evicted: the prompt and the thought tokens that share its last block."""
        return self._round_up(prompt_len)

    def blocks(self, num_tokens: int) -> int:
        """Cache blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def cache_limit(self, prompt_len: int) -> int | None:
        """Most tokens a layer may hold for this prompt: pinned + W; None without a window."""
        return None if self.window is None else self.pinned(prompt_len) + self.window

    def segment(self, prompt_len: int, position: int) -> int:
        """Number of evictions that precede the token at `position`."""
        if self.window is None:
            return 0
        past_window = position - self.pinned(prompt_len) - self.window
        return 0 if past_window < 0 else past_window // self.chunk + 1

    def segment_start(self, prompt_len: int, segment: int) -> int:
        """Position of the first token of a segment; segment 0 starts with the prompt."""
        if segment == 0:
            return 0
        assert self.window is not None, "without a window there is one segment"
        return self.pinned(prompt_len) + self.window + (segment - 1) * self.chunk

    def next_boundary(self, prompt_len: int, position: int) -> int | None:
        """First position after `position` at which tokens are evicted; None without a window."""
        if self.window is None:
            return None
        return self.segment_start(prompt_len, self.segment(prompt_len, position) + 1)

    def evicted_at(self, prompt_len: int, position: int) -> tuple[int, int] | None:
        """Positions ``[lo, hi)`` that leave just before the token at `position` is processed, or None."""
        segment = self.segment(prompt_len, position)
        if segment == 0 or position != self.segment_start(prompt_len, segment):
            return None
        hi = self.first_visible_thought(prompt_len, segment)
        return hi - self.chunk, hi

    def first_visible_thought(self, prompt_len: int, segment: int) -> int:
        """Oldest position beyond the pinned ones that a segment still sees.

        The visible window of a token at `position` is ``[0, pinned) + [first_visible_thought, position]``.
        """
        return self.pinned(prompt_len) + segment * self.chunk

    def evicted_before(self, prompt_len: int, position: int) -> int:
        """Tokens that have left once the token at `position` runs."""
        return self.segment(prompt_len, position) * self.chunk

    def visible_before(self, prompt_len: int, position: int) -> list[int]:
        """Positions the token at `position` sees before itself, oldest first: the pinned ones, then the window."""
        pinned, oldest = self.visible_spans(prompt_len, position)
        return [*range(pinned), *range(oldest, position)]

    def visible_spans(self, prompt_len: int, position: int) -> tuple[int, int]:
        """(pinned, oldest): before itself the token at `position` sees ``[0, pinned)`` and ``[oldest, position)``."""
        oldest = self.first_visible_thought(prompt_len, self.segment(prompt_len, position))
        return min(self.pinned(prompt_len), position), min(oldest, position)

    def full(self) -> "Schedule":
        """The same blocks without a window: nothing is ever evicted."""
        return replace(self, window=None)

    def is_visible(self, prompt_len: int, query: int, key: int) -> bool:
        """Whether the token at position `query` attends to the one at `key`."""
        if key > query:
            return False
        if key < self.pinned(prompt_len):
            return True
        return key >= self.first_visible_thought(prompt_len, self.segment(prompt_len, query))

    def num_evictions(self, prompt_len: int, num_tokens: int) -> int:
        """Evictions that happened once the first `num_tokens` tokens (prompt included) have entered the cache."""
        return self.segment(prompt_len, num_tokens - 1) if num_tokens else 0

    def chunks(self, prompt_len: int, num_tokens: int, max_tokens: int | None = None) -> list[Chunk]:
        """Split positions ``[0, num_tokens)`` at the eviction boundaries, into chunks of at most `max_tokens`."""
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: must be positive")
        out, start = [], 0
        while start < num_tokens:
            boundary = self.next_boundary(prompt_len, start)
            end = num_tokens if boundary is None else min(boundary, num_tokens)
            if max_tokens is not None:
                end = min(end, start + max_tokens)
            segment = self.segment(prompt_len, start)
            out.append(Chunk(start, end, segment, self.evicted_at(prompt_len, start)))
            start = end
        return out

    def _round_up(self, n: int) -> int:
        return self.blocks(n) * self.block_size
