"""What the calls of a replay owe each other: keys and values, states, and the gradients that flow back along them.

Going forwards a call leaves its keys and values in the store (store.py) and its states to the next call. Going
backwards it is owed gradients for both: by the later calls that saw or encoded what it left. This is the account of
that, for some of a model's layers. Left out: running a call, which is `Replay`'s on one rank and megatron/replay.py's
over pipeline stages.

Shape suffixes as in plan.py; H kv heads, D head_dim, R rank.
"""

import torch
from torch import Tensor

from verl_pte.learner.cache import CallCache
from verl_pte.learner.plan import Call, ReplayPlan
from verl_pte.learner.store import GradientRing, KVStore


class Ledger:
    """Account of one replay.

    Args:
        plan: the calls.
        num_layers: whose keys, values and states are kept here.
        gradient: as in PTEConfig.
        on_host: keep the store in host memory.
    """

    def __init__(self, plan: ReplayPlan, num_layers: int, gradient: str, on_host: bool) -> None:
        self.plan, self.num_layers, self.gradient, self.on_host = plan, num_layers, gradient, on_host
        self.stores: list[KVStore] = []
        self._states: list[list[Tensor | None]] = []  # incoming, per call and layer
        self._rings: list[GradientRing] = []
        self._d_states: list[Tensor | None] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of the K/V store."""
        return sum(store.num_bytes for store in self.stores)

    # -- forwards
    # ---------------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Before the first call."""
        self._states = [[None] * self.num_layers]

    def cache(self, index: int, call: Call) -> CallCache:
        """What call `index` sees, without gradients."""
        cache = CallCache(call, self.num_layers, self._states[index])
        for layer, store in zip(cache.layers, self.stores, strict=False):  # no store yet on the first call
            if call.past_BP.shape[1]:
                layer.past = store.get(call.past_BP)
            if call.evicted_BC is not None:
                layer.evicted = store.get(call.evicted_BC)
        return cache

    def hand_on(self, states: list[Tensor | None]) -> None:
        """Hand a call's states, one a layer, to the next call; calls come in order."""
        self._states.append(states)

    def keep(self, call: Call, cache: CallCache) -> None:
        """Take in the keys and values a call has made."""
        if not self.stores:
            length = max(self.plan.run_lens)
            self.stores = [KVStore(self.plan.batch_size, length, layer.own[0], self.on_host) for layer in cache.layers]
        rows, columns, positions = call.kept_3M
        for layer, store in zip(cache.layers, self.stores, strict=True):
            store.put(rows, columns, positions, *layer.own)

    # -- backwards
    # --------------------------------------------------------------------------------------------------------------

    def turn(self, num_calls: int) -> None:
        """After the last call and before its backward. Raises RuntimeError unless all calls have run, once."""
        if len(self._states) != num_calls + 1:
            raise RuntimeError("Replay.backward needs one Replay.forward before it, and can be called once")
        self._states.pop()
        schedule = self.plan.schedule
        self._pinned_max = max(schedule.pinned(p) for p in self.plan.prompt_lens)
        self._reach = max(self.plan.run_lens) if schedule.window is None else schedule.window + schedule.chunk
        length = self._pinned_max + self._reach + 1  # one slot more for padding
        self._rings = [GradientRing(length, store) for store in self.stores]
        pinned_B1 = [[schedule.pinned(p)] for p in self.plan.prompt_lens]
        self._pinned_B1 = torch.tensor(pinned_B1, device=self.plan.device)
        self._d_states = [None] * self.num_layers

    def leaves(self, index: int, call: Call) -> CallCache:
        """What call `index` sees, as leaves that take gradients; once a call.

        In `state` and `truncated` mode only what belongs to the call's own segment is more than a constant.
        """
        cache = self.cache(index, call)
        states, self._states[index] = self._states[index], []
        cache.states_in = [None if s is None else s.detach().requires_grad_() for s in states]
        constant = self.gradient != "full"
        for layer in cache.layers:
            if layer.past is not None and not (constant and not call.same_segment_BP.any()):
                layer.past = tuple(t.requires_grad_() for t in layer.past)
            if layer.evicted is not None and not constant:
                layer.evicted = tuple(t.requires_grad_() for t in layer.evicted)
        return cache

    def owed(self, call: Call, layer: int) -> list[Tensor]:
        """Gradients that later calls owe to this one's keys and values: two float32 [B, H, N, D], collected once."""
        return self._rings[layer].collect(self._slots(call, "positions_BN"), call.valid_BN)

    def owed_state(self, layer: int) -> Tensor | None:
        """Gradient that the next call owes to the state it was handed: float32 [B, R, R]."""
        return self._d_states[layer]

    def credit_past(self, call: Call, layer: int, d_key: Tensor | None, d_value: Tensor | None) -> None:
        """Put down what reached the keys and the values of the visible past: [B, H, P, D], None where nothing did."""
        keep_BP = call.past_valid_BP if self.gradient == "full" else call.past_valid_BP & call.same_segment_BP
        self._rings[layer].add(self._slots(call, "past_BP"), keep_BP, (d_key, d_value))

    def credit_evicted(self, call: Call, layer: int, d_key: Tensor | None, d_value: Tensor | None) -> None:
        """Put down what reached the keys and the values that were encoded: [B, H, C, D], None where nothing did."""
        assert self.gradient == "full" and call.evicting_B is not None and call.evicted_BC is not None
        keep_BC = call.evicting_B[:, None].expand_as(call.evicted_BC)
        self._rings[layer].add(self._slots(call, "evicted_BC"), keep_BC, (d_key, d_value))

    def credit_state(self, call: Call, layer: int, gradient: Tensor | None) -> None:
        """Put down what reached the state a call was handed."""
        if gradient is not None and self.gradient == "truncated" and call.evicting_B is not None:
            gradient = torch.where(call.evicting_B[:, None, None], 0.0, gradient)
        self._d_states[layer] = gradient

    def _slots(self, call: Call, name: str) -> Tensor:
        """Of a ring, for positions [B, ...] of the call; worked out once for all layers."""
        if name not in call.ring_slots:
            positions = getattr(call, name)
            past_pinned = positions - self._pinned_B1
            in_window = self._pinned_max + past_pinned % self._reach
            call.ring_slots[name] = torch.where(past_pinned < 0, positions, in_window)
        return call.ring_slots[name]
