"""Attention backends: what a model with each of them has to be called with.

The choice is transformers' own, ``attn_implementation`` of the model. A call says which query sees which key by a mask;
each backend wants it in its own form:

    sdpa               the bool mask
    eager              numbers to add: eager attention adds whatever it gets, a bool mask there is silently wrong
    flex_attention     a `BlockMask`, which skips blocks that nobody sees; PyTorch has its backward on GPUs alone
    flash_attention_2  no mask: sequences packed without padding (flash.py)

Decode steps of the rollout engine have attentions of their own (engine/attention.py, engine/flash_decode.py).

Shape suffixes: B rows, N queries a row, S keys a row.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from verl_pte.core import flash

BACKENDS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
NEEDS_GPU = BACKENDS[2:]  # for gradients, and flash-attn for anything


def attention_inputs(visible_B1NS: Tensor, valid_BN: Tensor, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of the model's forward that make queries see what they should.

    Args:
        visible_B1NS: bool, True where a query sees a key. A query sees the past of its row and the call's own tokens up
            to itself.
        valid_BN: bool, queries that are not padding.
        config: of the model; its `_attn_implementation` is the backend in use now.
        dtype: of the model's activations.
    """
    backend = config._attn_implementation
    if backend == flash.NAME:
        return {"attention_mask": None, "packing": flash.Packing.of(visible_B1NS, valid_BN)}
    if backend == "flex_attention":
        return {"attention_mask": block_mask(visible_B1NS)}
    if backend == "eager":
        lowest = torch.finfo(dtype).min
        return {"attention_mask": torch.zeros_like(visible_B1NS, dtype=dtype).masked_fill(~visible_B1NS, lowest)}
    return {"attention_mask": visible_B1NS}


def block_mask(visible_B1NS: Tensor) -> Any:
    """A `BlockMask` of what is seen."""
    rows, _, queries, keys = visible_B1NS.shape

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return visible_B1NS[b, 0, i, j]

    return create_block_mask(seen, rows, None, queries, keys, device=visible_B1NS.device)


@contextlib.contextmanager
def selected(config: Any, names: dict[str, str]) -> Iterator[None]:
    """For a while, a model with this config has attention ``names[x]`` in place of x."""
    before = config._attn_implementation
    config._attn_implementation = names.get(before, before)
    try:
        yield
    finally:
        config._attn_implementation = before
