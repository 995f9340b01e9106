"""Thought encoder: turns the keys and values of evicted tokens into the thought state.

One encoder a layer. Paper (section 3; letters there: superscript a for the learned projections, q_g for the global
queries)::

    S'  = (W_Q q_g) (W_K K)^T (W_V V)        encode      K, V of the evicted tokens
    S  <- Normalize(S + S')                  accumulate
    S0  = Normalize(encode of the global tokens' own keys and values)

K is the key as cached, after RoPE and with all KV heads side by side. Taken literally the sum lets every eviction
erase what was there (S' is many times larger than S), so S' is first rescaled to ``update_strength * ||S||``;
``None`` is the literal form.

The state is float32 whatever the model's dtype. Left out: when tokens are evicted (schedule.py) and where they lie
(cache.py).

Shape suffixes: B sequences, E evicted tokens, K kv heads x head_dim, R rank.
"""

import math

import torch
from torch import Tensor, nn

# Added to squared norms: keeps 0 / 0 and its gradient finite, far below any norm that carries information.
_EPS = 1e-12


class Vectors(nn.Module):
    """`count` learned vectors, looked up as an embedding would.

    A leaf of its own class with a ``.weight`` that its forward uses: FSDP1 gathers only such leaves, and verl's FSDP2
    wrapping would shard an ``nn.Embedding`` a second time, apart from its decoder layer.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))

    def forward(self) -> Tensor:
        """All vectors: [count, dim]."""
        index = torch.arange(self.weight.shape[0], device=self.weight.device)
        return nn.functional.embedding(index, self.weight)


class ThoughtEncoder(nn.Module):
    """State update of one layer.

    Every parameter belongs to a called leaf module with a ``.weight``, which is what FSDP1 needs.

    Args:
        kv_dim: kv heads x head_dim.
        rank: side of the state.
        num_global_tokens: learned tokens of the initial state; 0 starts from zero.
        update_strength: norm of S' relative to the state's, or None for the literal sum.
        update_state: False leaves the initial state untouched (Global-Only).
        normalize: "row" or "frobenius"; both give a state of Frobenius norm sqrt(rank).
        attention: "linear" (the paper) or "softmax" over the evicted tokens.
    """

    def __init__(
        self,
        kv_dim: int,
        rank: int,
        *,
        num_global_tokens: int,
        update_strength: float | None,
        update_state: bool,
        normalize: str,
        attention: str,
    ) -> None:
        super().__init__()
        self.rank, self.num_global_tokens = rank, num_global_tokens
        self.update_strength, self.update_state = update_strength, update_state
        self.normalize, self.attention = normalize, attention
        self.W_Q, self.W_K, self.W_V = (nn.Linear(kv_dim, rank, bias=False) for _ in range(3))
        self.global_queries = Vectors(rank, kv_dim)
        self.global_keys = Vectors(num_global_tokens, kv_dim) if num_global_tokens else None
        self.global_values = Vectors(num_global_tokens, kv_dim) if num_global_tokens else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections keep the scale of their input; global queries and tokens are unit normal."""
        for linear in (self.W_Q, self.W_K, self.W_V):
            nn.init.normal_(linear.weight, std=1.0 / math.sqrt(linear.in_features))
        for vectors in (self.global_queries, self.global_keys, self.global_values):
            if vectors is not None:
                nn.init.normal_(vectors.weight)

    def initial_state(self, batch: int) -> Tensor:
        """S0 for `batch` sequences: float32 [B, R, R], from the global tokens, or zero without them."""
        if self.global_keys is None or self.global_values is None:
            return torch.zeros(batch, self.rank, self.rank, device=self.W_K.weight.device)
        raw_1RR = self.encode(self.global_keys()[None], self.global_values()[None])
        return self._normalize(raw_1RR).expand(batch, -1, -1)

    def encode(self, k_BEK: Tensor, v_BEK: Tensor) -> Tensor:
        """S' of the evicted tokens, before any scaling: float32 [B, R, R]."""
        dtype, device = self.W_K.weight.dtype, k_BEK.device
        q_RR = self.W_Q(self.global_queries()).float()
        k_BER = self.W_K(k_BEK.to(dtype)).float()
        v_BER = self.W_V(v_BEK.to(dtype)).float()
        with torch.autocast(device.type, enabled=False):
            scores_BRE = q_RR @ k_BER.transpose(-1, -2)
            if self.attention == "softmax":
                scores_BRE = (scores_BRE / math.sqrt(self.rank)).softmax(-1)
            return scores_BRE @ v_BER

    def accumulate(self, state_BRR: Tensor, raw_BRR: Tensor) -> Tensor:
        """Normalize(S + S'), with S' rescaled to the update strength."""
        if self.update_strength is not None:
            raw_BRR = raw_BRR * (self.update_strength * math.sqrt(self.rank) * _inverse_norm(raw_BRR, (-2, -1)))
        return self._normalize(state_BRR + raw_BRR)

    def _normalize(self, state_BRR: Tensor) -> Tensor:
        if self.normalize == "row":
            return state_BRR * _inverse_norm(state_BRR, (-1,))
        return state_BRR * (math.sqrt(self.rank) * _inverse_norm(state_BRR, (-2, -1)))


def _inverse_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x.square().sum(dims, keepdim=True) + _EPS).rsqrt()
