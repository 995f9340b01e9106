"""The thought encoder where a rank holds some of the kv heads.

``W_K K`` and ``W_V V`` are sums over heads, so ranks add up their parts *before* the two are multiplied: summed
products would lack the terms of one rank's keys with another's values. W_K, W_V and the global tokens are cut along
the kv dimension like the heads; the global queries and W_Q, which make a [rank, rank] matrix from nothing else, are
whole on every rank.

Everything after the sum is the same on all ranks, and so are its gradients; in backward the sum hands each rank the
gradient of its own part as it is.

Shape suffixes as in core/encoder.py, K being a rank's kv heads x head_dim.
"""

from typing import Any

import torch
from torch import Tensor, nn

from verl_pte.core.encoder import ThoughtEncoder
from verl_pte.megatron.collectives import reduce
from verl_pte.megatron.placement import place, sharded

SHARDED = ("W_K", "W_V", "global_keys", "global_values")


class ShardedThoughtEncoder(ThoughtEncoder):
    """One rank's part of a layer's encoder; made whole and then cut, so that all shardings start alike."""

    def __init__(self, kv_dim: int, rank: int, *, group: Any, **settings: Any) -> None:
        super().__init__(kv_dim, rank, **settings)
        self.group = group
        for name, matrix in self.named_children():
            place(matrix.weight, 1 if name in SHARDED else None, group)

    def encode(self, k_BEK: Tensor, v_BEK: Tensor) -> Tensor:
        """S' of the evicted tokens, from this rank's heads: float32 [B, R, R], the same on all ranks."""
        linear = nn.functional.linear
        W_K, W_V = self._matrix("W_K"), self._matrix("W_V")
        parts = torch.stack([linear(k_BEK.to(W_K.dtype), W_K).float(), linear(v_BEK.to(W_V.dtype), W_V).float()])
        return self.attend(*reduce(parts, self.group))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """For megatron-core's distributed checkpoints."""
        return sharded(self, prefix, sharded_offsets, metadata, self.group)
