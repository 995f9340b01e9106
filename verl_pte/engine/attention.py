"""Attention of decode steps: heads that share keys and values ask together, instead of each getting a copy.

transformers' sdpa path repeats keys and values for every query head when there is a mask, a copy of the whole cache a
layer and step. With one query a head, the heads of a group can be the queries of one head: the same sums, no copy.
Registered with transformers under NAME; the engine selects it for its decode steps, but where the model has eager
attention, or flash-attn's (flash_decode.py).

Shape suffixes: B rows, H heads, K kv heads, G heads a kv head, S slots, D head_dim.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from verl_pte.engine import flash_decode

NAME = "pte_decode"
# flash-attn's build for AMD's GPUs ignores where a run begins.
_FLASH = flash_decode.NAME if torch.version.hip is None else NAME
REPLACES = {"sdpa": NAME, "flex_attention": NAME, "flash_attention_2": _FLASH}


def decode_attention(
    module: nn.Module,
    query_BH1D: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it; `attention_mask` is [B, 1, 1, S]. Returns [B, 1, H, D]."""
    query_BKGD = query_BH1D.view(len(key_BKSD), key_BKSD.shape[1], -1, key_BKSD.shape[3])
    out_BKGD = nn.functional.scaled_dot_product_attention(
        query_BKGD, key_BKSD, value_BKSD, attn_mask=attention_mask, scale=scaling
    )
    return out_BKGD.flatten(1, 2)[:, None], None


AttentionInterface.register(NAME, decode_attention)
