"""The thought encoders of all layers as one, for rollouts: one batched product where a loop would make a call a layer.

A snapshot of the weights: whoever holds it makes a new one after they have changed (engine/engine.py does whenever it
starts from idle, the only time at which they may change). Left out: gradients and sharding, which need the encoders
themselves, inside their layers' forward.

Shape suffixes: L layers, B sequences, E evicted tokens, K kv heads x head_dim, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from verl_pte.core.encoder import ThoughtEncoder


class EncoderStack:
    """Copies of what `encoders` (one a layer, equal settings) multiply by.

    Attributes:
        initial_LRR: the state every sequence starts from.
        update_state: False leaves it at that.
    """

    @torch.no_grad()
    def __init__(self, encoders: Sequence[ThoughtEncoder]) -> None:
        self._settings = encoders[0]
        self.update_state = encoders[0].update_state
        self.initial_LRR = torch.stack([encoder.initial_state(1)[0] for encoder in encoders])
        self.queries_L1RR = torch.stack([encoder.queries() for encoder in encoders])[:, None]
        self.W_K_LKR = torch.stack([encoder.W_K.weight.T for encoder in encoders])
        self.W_V_LKR = torch.stack([encoder.W_V.weight.T for encoder in encoders])

    def after_eviction(self, state_LBRR: Tensor, k_LBEK: Tensor, v_LBEK: Tensor) -> Tensor:
        """States once these keys and values have left: float32 [L, B, R, R]."""
        k_LBER, v_LBER = _project(k_LBEK, self.W_K_LKR), _project(v_LBEK, self.W_V_LKR)
        return self._settings.accumulate(state_LBRR, self._settings.attend(k_LBER, v_LBER, self.queries_L1RR))


def _project(x_LBEK: Tensor, W_LKR: Tensor) -> Tensor:
    return torch.bmm(x_LBEK.to(W_LKR.dtype).flatten(1, 2), W_LKR).float().unflatten(1, x_LBEK.shape[1:3])
