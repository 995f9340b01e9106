"""The thought state of every request in a vLLM worker: who has which slot, and what happens before a step.

Before each step `prepare` is told what the step runs. Requests that begin get a slot and the initial state; for those
that cross into a new segment the evicted blocks are read, while they still hold what is evicted, and their states
move on; then every token is told its slot, and attention where the gaps are.

A slot belongs to a request while it runs. A preempted request gives its slot back: it is recomputed from its prompt,
and its state with it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from verl_pte.core.schedule import Schedule
from verl_pte.vllm.adapter import LayerAdapter, TokenStates
from verl_pte.vllm.attention import BoundedAttention, Gaps


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
        self.slots: dict[str, int] = {}
        self.positions: dict[str, int] = {}  # of the next token of each request that has a slot
        self.free = list(range(num_slots, 0, -1))
        self._filled = 0

    def release(self, request_ids: Iterable[str]) -> None:
        """Take slots back, from finished and preempted requests; ids without one are passed over."""
        for request_id in request_ids:
            if request_id in self.slots:
                self.free.append(self.slots.pop(request_id))
                del self.positions[request_id]

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
        gaps: list[tuple[int, int, int]] = []
        for i, (request_id, prompt_len, start) in enumerate(zip(request_ids, prompt_lens, starts, strict=True)):
            end = start + int(counts[i])
            segment = self.schedule.segment(prompt_len, start)
            assert self.schedule.segment(prompt_len, end - 1) == segment, f"step {start}:{end} crosses an eviction"
            if request_id not in self.slots:
                assert segment == 0, f"request {request_id} begins at {start}, after an eviction"
                self.slots[request_id] = self.free.pop()
                fresh.append(self.slots[request_id])
            else:
                assert self.positions[request_id] == start, f"request {request_id} jumps to {start}"
            self.positions[request_id] = end
            evicted = self.schedule.evicted_at(prompt_len, start)
            if evicted is not None:
                evicting.append(self.slots[request_id])
                blocks.append(block_table[i, self.schedule.blocks(evicted[0]) : self.schedule.blocks(evicted[1])])
            gone = self.schedule.evicted_before(prompt_len, start)
            gaps.append((self.schedule.blocks(self.schedule.pinned(prompt_len)), self.schedule.blocks(gone), gone))
        self.gaps.set(gaps)
        if self.states is not None:
            self._tell_tokens(np.repeat([self.slots[request_id] for request_id in request_ids], counts))
            self._update(self.states, fresh, evicting, blocks)

    def _tell_tokens(self, slots: np.ndarray) -> None:
        assert self.states is not None
        slots_T = self.states.slots_T
        slots_T[len(slots) : self._filled] = 0
        slots_T[: len(slots)].copy_(torch.from_numpy(slots))
        self._filled = len(slots)

    def _update(self, states: TokenStates, fresh: list[int], evicting: list[int], blocks: list[Any]) -> None:
        device = states.slots_T.device
        if fresh:
            fresh_slots = torch.tensor(fresh, device=device)
            for adapter, _ in self.layers:
                states.by_layer_LSRR[adapter.index, fresh_slots] = adapter.initial_RR
        if evicting and self.layers[0][0].config.update_state:
            slots = torch.tensor(evicting, device=device)
            blocks_BP = torch.from_numpy(np.stack(blocks)).to(device, torch.long)
            for adapter, attention in self.layers:
                old_BRR = states.by_layer_LSRR[adapter.index, slots]
                states.by_layer_LSRR[adapter.index, slots] = adapter.after_eviction(
                    old_BRR, *attention.read_blocks(blocks_BP)
                )
