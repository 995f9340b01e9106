"""The cache of one replay call: past keys and values as autograd leaves, and the way of the state through the call.

Unlike the rollout's `BoundedCache` it writes nothing in place: attention sees ``cat(visible past, own)``, so that
gradients reach both. What the call's keys, values and states are to the next calls is read off it afterwards
(replay.py).

Shape suffixes as in plan.py and core/cache.py.
"""

from typing import Any

import torch
from torch import Tensor

from verl_pte.core.cache import MaskedLayer, ThoughtCache
from verl_pte.core.encoder import ThoughtEncoder
from verl_pte.learner.plan import Call


class _CallLayer(MaskedLayer):
    """One layer: the visible past and, after its attention ran, the call's own keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.past: tuple[Tensor, Tensor] | None = None
        self.evicted: tuple[Tensor, Tensor] | None = None
        self.own: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Past and own keys and values, [B, H, P + N, D]."""
        self.own = (key_states, value_states)
        if self.past is None:
            return self.own
        return torch.cat([self.past[0], key_states], dim=2), torch.cat([self.past[1], value_states], dim=2)


class CallCache(ThoughtCache):
    """Cache and states of one call.

    Args:
        call: what is run.
        num_layers: of the model.
        states_in: state of each layer before the call, [B, R, R], or None (first call).
    """

    def __init__(self, call: Call, num_layers: int, states_in: list[Tensor | None]) -> None:
        self.call, self.states_in = call, states_in
        self.states_out: list[Tensor | None] = [None] * num_layers
        # ||S|| before and ||S'|| / ||S|| of the update of each layer so far, [B], zero where a row does not evict.
        self.state_norms: list[Tensor] = []
        self.update_ratios: list[Tensor] = []
        super().__init__(layers=[_CallLayer() for _ in range(num_layers)])

    def thought_state(self, layer: int, encoder: ThoughtEncoder) -> Tensor:
        """The state the call's tokens see: initial for fresh sequences, updated for evicting ones."""
        call, state_BRR = self.call, self.states_in[layer]
        if call.fresh_B is not None:
            initial_BRR = encoder.initial_state(len(call.fresh_B))
            fresh_B11 = call.fresh_B[:, None, None]
            state_BRR = initial_BRR if state_BRR is None else torch.where(fresh_B11, initial_BRR, state_BRR)
        assert state_BRR is not None, "the first call of a replay starts every sequence"
        if call.evicting_B is not None and encoder.update_state:
            evicted = self.layers[layer].evicted
            keys_BCK, values_BCK = (t.transpose(1, 2).flatten(2) for t in evicted)
            raw_BRR = encoder.encode(keys_BCK, values_BCK)
            if not torch.is_grad_enabled():  # once is enough: the pass with gradients repeats the one without
                self._record(state_BRR, raw_BRR)
            state_BRR = torch.where(call.evicting_B[:, None, None], encoder.accumulate(state_BRR, raw_BRR), state_BRR)
        self.states_out[layer] = state_BRR
        return state_BRR

    def _record(self, state_BRR: Tensor, raw_BRR: Tensor) -> None:
        # Masked, not indexed: a bool index would make the host wait for the device, once a layer.
        norms_B, raw_norms_B = (t.detach().flatten(1).norm(dim=1) for t in (state_BRR, raw_BRR))
        evicting_B = self.call.evicting_B
        assert evicting_B is not None
        self.state_norms.append(torch.where(evicting_B, norms_B, 0.0))
        # Without global tokens the first update meets a zero state: no ratio.
        begun_B = evicting_B & (norms_B > 0)
        self.update_ratios.append(torch.where(begun_B, raw_norms_B / norms_B.clamp_min(1e-12), 0.0))
