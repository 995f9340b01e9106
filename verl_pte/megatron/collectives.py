"""Between what every tensor-parallel rank has and what each has a part of: two mappings, each the other's gradient.

megatron-core's own (`reduce_from_` and `copy_to_tensor_model_parallel_region`) add up a contiguous copy and return
what they were given, so a tensor that is not contiguous comes back as it went in (read in 0.16.1); gradients often are
not. They also add up in place.

Left out: sequence parallelism's gather and scatter, where megatron-core's are used.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def reduce(part: Tensor, group: Any) -> Tensor:
    """The sum of all ranks' parts, on every rank. In backward each part gets the sum's gradient."""
    return _Reduce.apply(part, group)


def expand(whole: Tensor, group: Any) -> Tensor:
    """What every rank has alike, for use in computations in which ranks differ. In backward gradients are added up."""
    return _Expand.apply(whole, group)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        return _sum(part, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


def _sum(x: Tensor, group: Any) -> Tensor:
    if group.size() == 1:
        return x.view_as(x)
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
