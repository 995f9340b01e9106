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

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Added to squared norms: keeps 0 / 0 and its gradient finite, far below any norm that carries information.
_EPS = 1e-12


class Matrix(nn.Module):
    """A learned matrix; calling it returns it.

    A leaf of its own class with a ``.weight`` that its forward uses: FSDP1 gathers only such leaves, and verl's FSDP2
    wrapping would shard an ``nn.Embedding`` a second time, apart from its decoder layer.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def forward(self) -> Tensor:
        """The matrix: [rows, columns]."""
        # FSDP1 lends its leaf a view in place of the parameter, and frees what it shows when the forward ends.
        return self.weight if isinstance(self.weight, nn.Parameter) else self.weight.clone()


class ThoughtEncoder(nn.Module):
    """State update of one layer.

    Every parameter is a leaf module's ``.weight``, which is what FSDP1 needs. Each call of a leaf is then a collective,
    so a sharded model calls all leaves once a layer and call, whoever evicts: `gathered`.

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
        self.W_Q, self.W_K, self.W_V = (Matrix(rank, kv_dim) for _ in range(3))
        self.global_queries = Matrix(rank, kv_dim)
        if num_global_tokens:
            self.global_keys, self.global_values = (Matrix(num_global_tokens, kv_dim) for _ in range(2))
        self._held: dict[str, Tensor] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections keep the scale of their input; global queries and tokens are unit normal."""
        for name, matrix in self.named_children():
            std = 1.0 / math.sqrt(matrix.weight.shape[1]) if name.startswith("W_") else 1.0
            nn.init.normal_(matrix.weight, std=std)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Calls every leaf once, in the same order on all ranks, and works with what they return until the end."""
        self._held = {name: matrix() for name, matrix in self.named_children()}
        try:
            yield
        finally:
            self._held = {}

    def touch(self) -> Tensor:
        """A zero that depends on every parameter, with zero gradients."""
        return _Touch.apply(*(self._matrix(name) for name, _ in self.named_children()))

    def initial_state(self, batch: int) -> Tensor:
        """S0 for `batch` sequences: float32 [B, R, R], from the global tokens, or zero without them."""
        if not self.num_global_tokens:
            return torch.zeros(batch, self.rank, self.rank, device=self._matrix("W_K").device)
        raw_1RR = self.encode(self._matrix("global_keys")[None], self._matrix("global_values")[None])
        return self._normalize(raw_1RR).expand(batch, -1, -1)

    def encode(self, k_BEK: Tensor, v_BEK: Tensor) -> Tensor:
        """S' of the evicted tokens, before any scaling: float32 [B, R, R]."""
        linear = nn.functional.linear
        W_K, W_V = self._matrix("W_K"), self._matrix("W_V")
        return self.attend(linear(k_BEK.to(W_K.dtype), W_K).float(), linear(v_BEK.to(W_V.dtype), W_V).float())

    def queries(self) -> Tensor:
        """The projected global queries: float32 [R, R]."""
        return nn.functional.linear(self._matrix("global_queries"), self._matrix("W_Q")).float()

    def attend(self, k_BER: Tensor, v_BER: Tensor, q_RR: Tensor | None = None) -> Tensor:
        """S' from projected keys and values, float32 both; what ranks that hold some of the heads each have summed up.

        `q_RR` are this encoder's own queries unless others are given.
        """
        if q_RR is None:
            q_RR = self.queries()
        with _without_autocast(k_BER.device.type):
            scores_BRE = q_RR @ k_BER.transpose(-1, -2)
            if self.attention == "softmax":
                scores_BRE = (scores_BRE / math.sqrt(self.rank)).softmax(-1)
            return scores_BRE @ v_BER

    def accumulate(self, state_BRR: Tensor, raw_BRR: Tensor) -> Tensor:
        """Normalize(S + S'), with S' rescaled to the update strength."""
        if self.update_strength is not None:
            raw_BRR = raw_BRR * (self.update_strength * math.sqrt(self.rank) * _inverse_norm(raw_BRR, (-2, -1)))
        return self._normalize(state_BRR + raw_BRR)

    def _matrix(self, name: str) -> Tensor:
        return self._held[name] if self._held else getattr(self, name)()

    def _normalize(self, state_BRR: Tensor) -> Tensor:
        if self.normalize == "row":
            return state_BRR * _inverse_norm(state_BRR, (-1,))
        return state_BRR * (math.sqrt(self.rank) * _inverse_norm(state_BRR, (-2, -1)))


class _Touch(torch.autograd.Function):
    """A float32 zero of some tensors, which get zero gradients: one number in memory, whatever their sizes."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.like = [(t.shape, t.dtype) for t in tensors]
        return tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = {dtype: gradients[0].new_zeros((), dtype=dtype) for _, dtype in ctx.like}
        return tuple(zeros[dtype].expand(shape) for shape, dtype in ctx.like)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(device_type):  # the meta device, on which FLOPs are counted
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _inverse_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x.square().sum(dims, keepdim=True) + _EPS).rsqrt()
