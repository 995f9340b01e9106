"""The bounded KV cache: a transformers Cache with fixed slots, whose evicted tokens become the thought state.

Unmodified transformers decoders take it as ``past_key_values``. Every sequence owns one row of ``pinned_max + W``
slots: the window is a ring at their end, and pinned positions end where it begins, so that what a row holds has one
gap at most. Keys are cached after RoPE at absolute positions, so the order of slots does not matter, only which of
them may be seen: that is the 4D mask made here (transformers passes a 4D mask through as it is). One more slot at the
end takes the keys of padding, and padded queries see nothing else, so that no softmax row is empty.

One call of the model is, for prompts and for one more token of every row::

    step = cache.plan(rows, chunks, prompt_lens)     # integers from the schedule, on the host
    mask = cache.begin(step)                         # new slots become visible

    cache.evict(rows, spans)                         # where tokens leave: slots are emptied, states move on
    mask = cache.begin_decode(positions_B)

followed by::

    model(input_ids=..., attention_mask=mask, position_ids=cache.step.positions, past_key_values=cache, use_cache=True)

States change between calls only: a sequence gets its initial state in `begin`, and `evict` encodes the evicted keys
and values, of all layers at once and of no other rows, while they still lie in their slots. Inside the call each
decoder layer merely asks for the state (peft/model.py installs the hook). So a decode call has static shapes, does no
work for states, and is tensor work alone: one CUDA graph can hold it, whoever evicts. Nothing that outlives a call is
allocated after construction.

Left out: gradients (learner/cache.py keeps every token for that) and sampling.

Shape suffixes: B rows of a call, S slots (the padding slot included), H kv heads, D head_dim, N tokens of a call, E
rows that evict, C chunk, R rank, L layers.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from verl_pte.core.encoder import ThoughtEncoder
from verl_pte.core.encoder_stack import EncoderStack
from verl_pte.core.schedule import Chunk, Schedule
from verl_pte.core.transfer import upload

# Rows whose evicted keys and values are read at once: bounds the memory that takes. Rows seldom evict together.
_EVICT_ROWS = 8


class ThoughtCache(Cache):
    """A cache that also answers: which thought state do this layer's tokens see now?"""

    @abstractmethod
    def thought_state(self, layer: int, encoder: ThoughtEncoder) -> Tensor:
        """float32 [B, R, R] for the call under way; applies the eviction that precedes it. Once a layer and call."""


@dataclass
class Step:
    """What one call needs to know, as tensors on the cache's device."""

    rows: Tensor | None  # [B] row of each sequence; None = all rows in order
    positions: Tensor  # [B, N] absolute positions, 0 where padded
    slots: Tensor  # [B, N] where their keys go, the padding slot where padded
    valid: Tensor  # [B, N] bool
    fresh: Tensor | None  # [B] bool, sequences that start now; None = none does
    pinned: Tensor  # [B] pinned tokens of each sequence


class MaskedLayer(CacheLayerMixin):
    """A cache layer for calls that bring their own 4D mask and positions.

    transformers then has no use for a layer's lengths, but its abstract class wants answers: ``get_max_length`` in
    newer releases, ``get_max_cache_shape`` in older ones.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of a mask transformers would build; the call brings its own."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: positions are always passed."""
        return 0

    def get_max_length(self) -> int:
        """-1: no length of its own."""
        return -1

    get_max_cache_shape = get_max_length


class _Current:
    """The step under way, shared by a cache and its layers.

    An object of its own, so that no layer refers back to its cache: memory is free the moment the cache is dropped.
    """

    step: Step


class _BoundedLayer(MaskedLayer):
    """Keys and values of one layer: two buffers [B, H, S, D], written in place."""

    is_compileable = True

    def __init__(self, current: _Current, keys_BHSD: Tensor, values_BHSD: Tensor) -> None:
        super().__init__()
        self.current = current
        self.keys, self.values = keys_BHSD, values_BHSD

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the call's keys and values [B, H, N, D] to their slots; return all slots of its rows [B, H, S, D]."""
        step = self.current.step
        index_BHND = step.slots[:, None, :, None].expand_as(key_states)
        if step.rows is None:
            return self.keys.scatter_(2, index_BHND, key_states), self.values.scatter_(2, index_BHND, value_states)
        keys = self.keys[step.rows].scatter_(2, index_BHND, key_states)
        values = self.values[step.rows].scatter_(2, index_BHND, value_states)
        self.keys[step.rows], self.values[step.rows] = keys, values
        return keys, values


class BoundedCache(ThoughtCache):
    """Slots for `num_rows` sequences of different prompt lengths under one schedule; for inference (no grad).

    Args:
        schedule: when what is evicted.
        num_rows: sequences held at once.
        max_prompt_length: longest prompt; its pinned length sizes every row.
        max_thoughts: longest response; sizes a row only where the window is None (full cache).
        num_layers, num_kv_heads, head_dim: of the model.
        rank: side of the thought state.
        dtype, device: of keys and values; states are float32.
        adapter_dtype: what states are lent in; that of keys and values if None.

    Attributes:
        encoders: what starts and moves the states; None leaves them alone.
    """

    encoders: EncoderStack | None = None

    def __init__(
        self,
        schedule: Schedule,
        *,
        num_rows: int,
        max_prompt_length: int,
        max_thoughts: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self.schedule, self.device = schedule, torch.device(device)
        self.num_rows, self.max_prompt_length, self.max_thoughts = num_rows, max_prompt_length, max_thoughts
        self.pinned_max = schedule.pinned(max_prompt_length)
        self.ring = max_thoughts if schedule.window is None else schedule.window
        self.padding_slot = self.pinned_max + self.ring
        shape = (num_layers, num_rows, num_kv_heads, self.padding_slot + 1, head_dim)
        self.keys_LBHSD, self.values_LBHSD = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        self._current = _Current()
        buffers = zip(self.keys_LBHSD, self.values_LBHSD, strict=True)
        super().__init__(layers=[_BoundedLayer(self._current, *pair) for pair in buffers])
        # Position held by each slot, -1 = empty. The padding slot never holds one.
        self.held_BS = torch.full((num_rows, self.padding_slot + 1), -1, dtype=torch.long, device=self.device)
        self._empty = torch.full((), -1, device=self.device)  # a number in its place would make the host wait
        self.pinned_B = torch.zeros(num_rows, dtype=torch.long, device=self.device)
        self.states_LBRR = torch.zeros(num_layers, num_rows, rank, rank, device=self.device)
        # What layers multiply by: the same states, converted when they change and not in every call.
        self.lent_LBRR = self.states_LBRR.to(adapter_dtype or dtype)
        self._lent_by_layer = list(self.lent_LBRR)

    @property
    def num_slots(self) -> int:
        """Slots of a row, the padding slot included: what a decode step attends over, seen or not."""
        return self.padding_slot + 1

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys, values, slot positions and states."""
        tensors = [self.keys_LBHSD, self.values_LBHSD, self.held_BS, self.pinned_B, self.states_LBRR]
        if self.lent_LBRR is not self.states_LBRR:
            tensors.append(self.lent_LBRR)
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def step(self) -> Step:
        """The call under way."""
        return self._current.step

    def occupancy(self, rows: Tensor | None = None) -> Tensor:
        """Tokens each row (all, or those given) holds now, per layer. Counted from the slots, not from the schedule."""
        return ((self.held_BS if rows is None else self.held_BS[rows]) >= 0).sum(1)

    def slot(self, prompt_len: int, position: int) -> int:
        """Slot of a position within its row."""
        offset = position - self.schedule.pinned(prompt_len)
        return self.pinned_max + (offset if offset < 0 else offset % self.ring)

    def plan(
        self,
        rows: Sequence[int] | None,
        chunks: Sequence[Chunk | None],
        prompt_lens: Sequence[int],
    ) -> Step:
        """Tensors for running `chunks[b]` of the sequence in row `rows[b]` (None: rows 0, 1, ...; a None chunk idles).

        What a chunk evicts is for `evict` to do before.
        """
        size = len(chunks)
        width = max((c.end - c.start for c in chunks if c is not None), default=1)
        positions = [[0] * width for _ in range(size)]
        slots = [[self.padding_slot] * width for _ in range(size)]
        lengths, fresh = [0] * size, [False] * size
        for b, (chunk, prompt_len) in enumerate(zip(chunks, prompt_lens, strict=True)):
            if chunk is None:
                continue
            lengths[b] = count = chunk.end - chunk.start
            positions[b][:count] = range(chunk.start, chunk.end)
            slots[b][:count] = [self.slot(prompt_len, p) for p in range(chunk.start, chunk.end)]
            fresh[b] = chunk.start == 0
        return Step(
            rows=None if rows is None else self._tensor(list(rows)),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            valid=self._tensor([[i < n for i in range(width)] for n in lengths]),
            fresh=self._tensor(fresh) if any(fresh) else None,
            pinned=self._tensor([self.schedule.pinned(n) for n in prompt_lens]),
        )

    def begin(self, step: Step) -> Tensor:
        """Make `step` the call under way; returns its mask, bool [B, 1, N, S], True where a query sees a slot."""
        _refuse_gradients()
        self._current.step = step
        held_BS = self.held_BS if step.rows is None else self.held_BS[step.rows]
        if step.fresh is not None:
            held_BS = held_BS.masked_fill(step.fresh[:, None], -1)
            rows = torch.arange(self.num_rows, device=self.device) if step.rows is None else step.rows
            self._start(rows[step.fresh], step.pinned[step.fresh])
        held_BS = held_BS.scatter(1, step.slots, torch.where(step.valid, step.positions, -1))
        if step.rows is None:
            self.held_BS.copy_(held_BS)
        else:
            self.held_BS[step.rows] = held_BS
        visible_BNS = (
            (held_BS >= 0)[:, None] & (held_BS[:, None] <= step.positions[:, :, None]) & step.valid[:, :, None]
        )
        visible_BNS[:, :, self.padding_slot] |= ~step.valid
        return visible_BNS[:, None]

    def begin_decode(self, position_B: Tensor) -> Tensor:
        """One token of every row, at these positions (-1: the row idles); returns the mask, bool [B, 1, 1, S]."""
        _refuse_gradients()
        offset_B = position_B - self.pinned_B
        slot_B = self.pinned_max + torch.where(offset_B < 0, offset_B, offset_B % self.ring)
        busy_B = position_B >= 0
        slots_B1 = torch.where(busy_B, slot_B, self.padding_slot)[:, None]
        self._current.step = Step(
            rows=None,
            positions=position_B.clamp_min(0)[:, None],
            slots=slots_B1,
            valid=busy_B[:, None],
            fresh=None,
            pinned=self.pinned_B,
        )
        self.held_BS.scatter_(1, slots_B1, position_B[:, None])
        visible_BS = self.held_BS >= 0  # what a row holds is never later than its newest token
        visible_BS[:, self.padding_slot] = ~busy_B
        return visible_BS[:, None, None]

    def evict(self, rows: Sequence[int], spans: Sequence[tuple[int, int]]) -> None:
        """Positions ``[lo, hi)`` of `spans[i]` leave row `rows[i]`; its states take them in."""
        from_first_C = torch.arange(self.schedule.chunk, device=self.device)
        for start in range(0, len(rows), _EVICT_ROWS):
            some = slice(start, start + _EVICT_ROWS)
            rows_E, first_E = self._tensor(list(rows[some])), self._tensor([lo for lo, _ in spans[some]])
            offset_EC = (first_E - self.pinned_B[rows_E])[:, None] + from_first_C  # pinned tokens never leave
            slots_EC = self.pinned_max + offset_EC % self.ring
            self.held_BS[rows_E[:, None], slots_EC] = self._empty
            if self.encoders is not None and self.encoders.update_state:
                k_LECK, v_LECK = (
                    buffer_LBHSD[:, rows_E[:, None], :, slots_EC].flatten(3).permute(2, 0, 1, 3)
                    for buffer_LBHSD in (self.keys_LBHSD, self.values_LBHSD)
                )
                states_LERR = self.states_LBRR[:, rows_E]
                self._set_states(rows_E, self.encoders.after_eviction(states_LERR, k_LECK, v_LECK))

    def thought_state(self, layer: int, encoder: ThoughtEncoder) -> Tensor:
        """States of the call's rows, in the adapter's dtype; `begin` and `evict` have seen to them."""
        lent_BRR, rows = self._lent_by_layer[layer], self._current.step.rows
        return lent_BRR if rows is None else lent_BRR[rows]

    def _start(self, rows_B: Tensor, pinned_B: Tensor) -> None:
        self.pinned_B[rows_B] = pinned_B
        if self.encoders is not None:
            self._set_states(rows_B, self.encoders.initial_LRR[:, None].expand(-1, len(rows_B), -1, -1))

    def _set_states(self, rows_B: Tensor, states_LBRR: Tensor) -> None:
        self.states_LBRR[:, rows_B] = states_LBRR
        if self.lent_LBRR is not self.states_LBRR:
            self.lent_LBRR[:, rows_B] = states_LBRR.to(self.lent_LBRR.dtype)

    def _tensor(self, values: list) -> Tensor:
        return upload(values, self.device)


def _refuse_gradients() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "BoundedCache is for inference: use torch.no_grad(), or verl_pte.learner.Replay for gradients"
        )
