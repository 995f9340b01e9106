"""The bounded KV cache: a transformers Cache with fixed slots, whose evicted tokens become the thought state.

Unmodified transformers decoders take it as ``past_key_values``. Every sequence owns one row of ``pinned_max + W``
slots: pinned positions lie left-aligned, the window behind them is a ring. Keys are cached after RoPE at absolute
positions, so the order of slots does not matter, only which of them may be seen: that is the 4D mask made here
(transformers passes a 4D mask through as it is). One more slot at the end takes the keys of padding, and padded
queries see nothing else, so that no softmax row is empty.

One call of the model is::

    step = cache.plan(rows, chunks, prompt_lens)     # integers from the schedule, on the host
    mask = cache.begin(step)                         # evicted slots become invisible, new ones visible
    model(input_ids=..., attention_mask=mask, position_ids=step.positions, past_key_values=cache, use_cache=True)

Inside it each decoder layer first asks for its thought state (peft/model.py installs the hook), which encodes the
evicted keys and values while they still lie in their slots; then attention writes the new ones. All shapes are
static, nothing that outlives a call is allocated after construction, and `begin` is tensor work alone: a CUDA graph
can hold it.

Left out: gradients (learner/cache.py keeps every token for that) and sampling.

Shape suffixes: B rows of a call, S slots (the padding slot included), H kv heads, D head_dim, N tokens of a call, C
chunk, R rank, L layers.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from verl_pte.core.encoder import ThoughtEncoder
from verl_pte.core.schedule import Chunk, Schedule


def attention_mask(visible: Tensor, attn_implementation: str, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = seen) as transformers' attention wants it: unchanged for sdpa, additive for eager.

    Eager attention adds whatever it gets; a bool mask there is silently wrong.
    """
    if attn_implementation != "eager":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


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
    evict_slots: Tensor | None  # [B, C] slots of the evicted tokens; None = nobody evicts
    evicting: Tensor | None  # [B] bool


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

    def __init__(self, current: _Current, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.current = current
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

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
    """

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
    ) -> None:
        self.schedule, self.device = schedule, torch.device(device)
        self.num_rows, self.max_prompt_length, self.max_thoughts = num_rows, max_prompt_length, max_thoughts
        self.pinned_max = schedule.pinned(max_prompt_length)
        self.ring = max_thoughts if schedule.window is None else schedule.window
        self.padding_slot = self.pinned_max + self.ring
        shape = (num_rows, num_kv_heads, self.padding_slot + 1, head_dim)
        self._current = _Current()
        super().__init__(layers=[_BoundedLayer(self._current, shape, dtype, self.device) for _ in range(num_layers)])
        # Position held by each slot, -1 = empty. The padding slot never holds one.
        self.held_BS = torch.full((num_rows, self.padding_slot + 1), -1, dtype=torch.long, device=self.device)
        self.states_LBRR = torch.zeros(num_layers, num_rows, rank, rank, device=self.device)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys, values, slot positions and states."""
        tensors = [self.held_BS, self.states_LBRR] + [t for layer in self.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def occupancy(self) -> Tensor:
        """Tokens each row holds now, per layer: [num_rows]. Counted from the slots, not from the schedule."""
        return (self.held_BS >= 0).sum(1)

    def slot(self, prompt_len: int, position: int) -> int:
        """Slot of a position within its row."""
        offset = position - self.schedule.pinned(prompt_len)
        return position if offset < 0 else self.pinned_max + offset % self.ring

    def plan(
        self,
        rows: Sequence[int] | None,
        chunks: Sequence[Chunk | None],
        prompt_lens: Sequence[int],
        *,
        decode: bool = False,
    ) -> Step:
        """Tensors for running `chunks[b]` of the sequence in row `rows[b]` (None: rows 0, 1, ...; a None chunk idles).

        With `decode` all chunks are one token and no sequence starts, so `fresh` is left out and shapes are static.
        """
        size = len(chunks)
        width = max((c.end - c.start for c in chunks if c is not None), default=1)
        positions = [[0] * width for _ in range(size)]
        slots = [[self.padding_slot] * width for _ in range(size)]
        evict_slots = [[self.padding_slot] * self.schedule.chunk for _ in range(size)]
        lengths, fresh, evicting = [0] * size, [False] * size, [False] * size
        for b, (chunk, prompt_len) in enumerate(zip(chunks, prompt_lens, strict=True)):
            if chunk is None:
                continue
            lengths[b] = count = chunk.end - chunk.start
            positions[b][:count] = range(chunk.start, chunk.end)
            slots[b][:count] = [self.slot(prompt_len, p) for p in range(chunk.start, chunk.end)]
            fresh[b] = chunk.start == 0
            if chunk.evicted is not None:
                evicting[b] = True
                evict_slots[b] = [self.slot(prompt_len, p) for p in range(*chunk.evicted)]
        any_evicts = any(evicting)
        return Step(
            rows=None if rows is None else self._tensor(list(rows)),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            valid=self._tensor([[i < n for i in range(width)] for n in lengths]),
            fresh=None if decode or not any(fresh) else self._tensor(fresh),
            evict_slots=self._tensor(evict_slots) if any_evicts else None,
            evicting=self._tensor(evicting) if any_evicts else None,
        )

    def begin(self, step: Step) -> Tensor:
        """Make `step` the call under way; returns its mask, bool [B, 1, N, S], True where a query sees a slot."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "BoundedCache is for inference: use torch.no_grad(), or verl_pte.learner.Replay for gradients"
            )
        self._current.step = step
        held_BS = self.held_BS if step.rows is None else self.held_BS[step.rows]
        if step.fresh is not None:
            held_BS = held_BS.masked_fill(step.fresh[:, None], -1)
        if step.evict_slots is not None:
            held_BS = held_BS.scatter(1, step.evict_slots, -1)
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

    def thought_state(self, layer: int, encoder: ThoughtEncoder) -> Tensor:
        """States of the call's rows: fresh rows start, evicting rows first take in what they evict."""
        step, states_BRR = self._current.step, self.states_LBRR[layer]
        state_BRR = states_BRR if step.rows is None else states_BRR[step.rows]
        if step.fresh is not None:
            state_BRR = torch.where(step.fresh[:, None, None], encoder.initial_state(len(state_BRR)), state_BRR)
        if step.evict_slots is not None and encoder.update_state:
            assert step.evicting is not None
            raw_BRR = encoder.encode(*self._evicted(layer, step))
            updated_BRR = encoder.accumulate(state_BRR, raw_BRR)
            state_BRR = torch.where(step.evicting[:, None, None], updated_BRR, state_BRR)
        if step.rows is None:
            return states_BRR.copy_(state_BRR)
        states_BRR[step.rows] = state_BRR
        return state_BRR

    def _evicted(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values of the evicted slots, heads side by side: [B, C, H * D] each."""
        assert step.evict_slots is not None
        out = []
        for buffer in (self.layers[layer].keys, self.layers[layer].values):
            rows_BHSD = buffer if step.rows is None else buffer[step.rows]
            index_BHCD = step.evict_slots[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            out.append(rows_BHSD.gather(2, index_BHCD).transpose(1, 2).flatten(2))
        return out[0], out[1]

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.device)
