"""The thought encoders of all layers as one, for rollouts: one batched product where a loop would make a call a layer.

A snapshot of the weights: whoever holds it makes a new one after they have changed (engine/engine.py does whenever it
starts from idle, the only time at which they may change). Left out: gradients, and encoders whose own weights are
sharded; both need the encoders themselves, inside their layers' forward.

Shape suffixes: L layers, B sequences, E evicted tokens, K kv heads x head_dim (of this rank), R rank.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from verl_pte.core.encoder import ThoughtEncoder


class HeadShare(NamedTuple):
    """The kv heads of a rank, where they are spread over ranks and the encoders are whole on each."""

    columns: slice  # of W_K and W_V
    counts: bool  # False where another rank adds the same heads
    all_reduce: Callable[[Tensor], Tensor]  # sum over ranks


class EncoderStack:
    """Copies of what `encoders` (one a layer, equal settings) multiply by.

    Attributes:
        initial_LRR: the state every sequence starts from.
        update_state: False leaves it at that.
    """

    @torch.no_grad()
    def __init__(self, encoders: Sequence[ThoughtEncoder], share: HeadShare | None = None) -> None:
        self._settings, self._share = encoders[0], share
        self.update_state = encoders[0].update_state
        self.initial_LRR = torch.stack([encoder.initial_state(1)[0] for encoder in encoders])
        self.queries_L1RR = torch.stack([encoder.queries() for encoder in encoders])[:, None]
        mine = slice(None) if share is None else share.columns
        self.W_K_LKR = torch.stack([encoder.W_K.weight[:, mine].T for encoder in encoders])
        self.W_V_LKR = torch.stack([encoder.W_V.weight[:, mine].T for encoder in encoders])

    def after_eviction(self, state_LBRR: Tensor, k_LBEK: Tensor, v_LBEK: Tensor) -> Tensor:
        """States once these keys and values have left: float32 [L, B, R, R]."""
        return self._moved(state_LBRR, _project(k_LBEK, self.W_K_LKR), _project(v_LBEK, self.W_V_LKR))

    def after_eviction_by_layer(self, state_LBRR: Tensor, evicted: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """The same from (keys, values) [B, E, K] of one layer after the other: one layer's are held at a time."""
        projected = [
            torch.stack((_project(k_BEK[None], W_K_KR[None]), _project(v_BEK[None], W_V_KR[None])))
            for (k_BEK, v_BEK), W_K_KR, W_V_KR in zip(evicted, self.W_K_LKR, self.W_V_LKR, strict=True)
        ]
        return self._moved(state_LBRR, *torch.cat(projected, dim=1))

    def _moved(self, state_LBRR: Tensor, k_LBER: Tensor, v_LBER: Tensor) -> Tensor:
        if self._share is not None:  # added up before they are multiplied: their product is not a sum over heads
            both = torch.stack((k_LBER, v_LBER))
            k_LBER, v_LBER = self._share.all_reduce(both if self._share.counts else torch.zeros_like(both))
        return self._settings.accumulate(state_LBRR, self._settings.attend(k_LBER, v_LBER, self.queries_L1RR))


def _project(x_LBEK: Tensor, W_LKR: Tensor) -> Tensor:
    return torch.bmm(x_LBEK.to(W_LKR.dtype).flatten(1, 2), W_LKR).float().unflatten(1, x_LBEK.shape[1:3])
