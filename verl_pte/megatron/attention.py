"""Core attention of a replay call: queries of the call against its visible past and itself.

Stands where megatron-core's DotProductAttention would, through the layer spec. What is seen is the call's bool mask,
the same as in the Hugging Face learner's (learner/plan.py). Keys and values pass on to later calls through
`collecting`: in backward it adds what those calls owe, so that megatron-core's schedules need to know nothing of it.

Left out: dropout, attention sinks, other kernels than torch's scaled_dot_product_attention.

Shape suffixes: N tokens of the call, B sequences, H heads of this rank, D head_dim, P visible past tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from verl_pte.megatron.current import Current


class CallAttention(MegatronModule):
    """Attention over ``cat(past, own)`` under the mask of the call under way."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, *, current: Current, **_: Any
    ) -> None:
        super().__init__(config)
        self.current, self.index = current, current.place(layer_number)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """q [N, B, H, D], k and v [N, B, kv heads, D] -> [N, B, H * D]."""
        run = self.current.run
        q_BHND, k_BHND, v_BHND = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if run.collect is not None and k_BHND.requires_grad:
            collect, index = run.collect, self.index
            k_BHND, v_BHND = collecting((k_BHND, v_BHND), lambda: collect(index))
        keys, values = run.cache.update(k_BHND, v_BHND, self.index)
        # Grouped queries under a mask would take torch's slow kernel, which keeps all scores; repeated heads do not.
        groups = q_BHND.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
        out_BHND = torch.nn.functional.scaled_dot_product_attention(
            q_BHND.contiguous(), keys, values, attn_mask=run.mask_B1NS
        )
        return out_BHND.permute(2, 0, 1, 3).flatten(2)


def collecting(tensors: tuple[Tensor, ...], owed: Callable[[], Sequence[Tensor | None]]) -> tuple[Tensor, ...]:
    """The tensors; in backward, `owed()` (one each, None for nothing) is added to their gradients."""
    return _Collecting.apply(owed, *tensors)


class _Collecting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owed: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.owed = owed
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(gradients, ctx.owed(), strict=True)
        return None, *(g if more is None else g + more.to(g.dtype) for g, more in pairs)
