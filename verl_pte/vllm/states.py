"""The thought state of every request in a vLLM worker: who has which slot, and what happens before a step.

Before each step `prepare` is told what the step runs. Requests that begin get a slot and the initial state; for those
that cross into a new segment the evicted blocks are read, while they still hold what is evicted, and their states
move on; then every token is told its slot, and attention where the gaps are.

A slot belongs to a request while it runs. A preempted request gives its slot back: it is recomputed from its prompt,
and its state with it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from verl_pte.core.encoder_stack import EncoderStack
from verl_pte.core.schedule import Schedule
from verl_pte.core.transfer import upload
from verl_pte.vllm.adapter import LayerAdapter, TokenStates
from verl_pte.vllm.attention import BoundedAttention, Gaps

# Requests whose evicted keys and values are read at once: bounds the memory that takes.
_EVICT_REQUESTS = 8


@dataclass
class Running:
    """A request that has a slot, and the segment its next tokens are in."""

    slot: int
    position: int = 0  # of the next token
    boundary: float = -1  # where the next segment begins
    gap: tuple[int, int, int] = (0, 0, 0)  # as in `Gaps`


class ThoughtStates:
    """Bookkeeping over a model's layers.

    Args:
        schedule: when what is evicted.
        layers: (adapter, attention) of each decoder layer.
        states: the buffers; None where the state is frozen to the identity.
        gaps: shared with the attention layers.
        num_slots: requests that run at once.
    """

    def __init__(
        self,
        schedule: Schedule,
        layers: Sequence[tuple[LayerAdapter, BoundedAttention]],
        states: TokenStates | None,
        gaps: Gaps,
        num_slots: int,
    ) -> None:
        self.schedule, self.layers, self.states, self.gaps = schedule, layers, states, gaps
        self.running: dict[str, Running] = {}
        self.free = list(range(num_slots, 0, -1))
        self._filled = 0
        self._encoders: EncoderStack | None = None

    def release(self, request_ids: Iterable[str]) -> None:
        """Take slots back, from finished and preempted requests; ids without one are passed over."""
        for request_id in request_ids:
            if request_id in self.running:
                self.free.append(self.running.pop(request_id).slot)

    def idle(self) -> None:
        """No request runs: what follows is a warm-up."""
        self.gaps.set([])
        if self.states is not None:
            self.states.slots_T.zero_()

    @torch.no_grad()
    def prepare(
        self,
        request_ids: Sequence[str],
        prompt_lens: Sequence[int],
        starts: Sequence[int],
        counts: np.ndarray,
        block_table: np.ndarray,
    ) -> None:
        """Get ready for a step that runs `counts[i]` tokens of request i from position `starts[i]` on.

        `block_table` is vLLM's, row i for request i: the evicted blocks are still in it.
        """
        fresh: list[int] = []
        evicting: list[int] = []
        blocks: list[np.ndarray] = []
        batch: list[Running] = []
        for i, (request_id, prompt_len, start) in enumerate(zip(request_ids, prompt_lens, starts, strict=True)):
            request = self.running.get(request_id)
            if request is None:
                request = self.running[request_id] = Running(self.free.pop(), position=start)
                fresh.append(request.slot)
                assert self.schedule.segment(prompt_len, start) == 0, f"request {request_id} begins after an eviction"
            assert request.position == start, f"request {request_id} jumps from {request.position} to {start}"
            if start >= request.boundary:
                evicted = self._enter_segment(request, prompt_len)
                if evicted is not None:
                    evicting.append(request.slot)
                    blocks.append(block_table[i, evicted[0] : evicted[1]])
            request.position = start + int(counts[i])
            assert request.position <= request.boundary, f"request {request_id}: a step crosses an eviction"
            batch.append(request)
        self.gaps.set([request.gap for request in batch])
        if self.states is not None:
            self._tell_tokens(np.repeat([request.slot for request in batch], counts))
            self._update(self.states, fresh, evicting, blocks)

    def _enter_segment(self, request: Running, prompt_len: int) -> tuple[int, int] | None:
        """Look up the segment of a request's next token; the blocks evicted where it begins, if that is here."""
        schedule, position = self.schedule, request.position
        boundary = schedule.next_boundary(prompt_len, position)
        request.boundary = math.inf if boundary is None else boundary
        gone = schedule.evicted_before(prompt_len, position)
        request.gap = (schedule.blocks(schedule.pinned(prompt_len)), schedule.blocks(gone), gone)
        evicted = schedule.evicted_at(prompt_len, position)
        return None if evicted is None else (schedule.blocks(evicted[0]), schedule.blocks(evicted[1]))

    def _tell_tokens(self, slots: np.ndarray) -> None:
        assert self.states is not None
        host_T, count = self.states.host_slots_T, max(len(slots), self._filled)
        host_T[: len(slots)] = torch.from_numpy(slots)
        host_T[len(slots) : count] = 0
        self.states.slots_T[:count].copy_(host_T[:count], non_blocking=True)
        self._filled = len(slots)

    def forget_weights(self) -> None:
        """The encoders' weights have changed: what was computed from them is computed again when it is needed."""
        self._encoders = None

    def _update(self, states: TokenStates, fresh: list[int], evicting: list[int], blocks: list[np.ndarray]) -> None:
        if not fresh and not evicting:
            return
        if self._encoders is None:
            adapters = [adapter for adapter, _ in self.layers]
            encoders = [adapter.encoder for adapter in adapters if adapter.encoder is not None]
            self._encoders = EncoderStack(encoders, adapters[0].share)
        stack, device = self._encoders, states.slots_T.device
        if fresh:
            states.by_layer_LSRR[:, upload(fresh, device)] = stack.initial_LRR[:, None]
        for start in range(0, len(evicting) if stack.update_state else 0, _EVICT_REQUESTS):
            some = slice(start, start + _EVICT_REQUESTS)
            slots_B = upload(evicting[some], device)
            blocks_BP = upload(np.stack(blocks[some]), device, torch.long)
            evicted = (attention.read_blocks(blocks_BP) for _, attention in self.layers)
            moved_LBRR = stack.after_eviction_by_layer(states.by_layer_LSRR[:, slots_B], evicted)
            states.by_layer_LSRR[:, slots_B] = moved_LBRR
