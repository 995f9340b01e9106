"""flash-attn for calls of many tokens: prefill and replay.

flash-attn takes no mask. It takes sequences one behind the other, without padding, and its causal attention lets the
last query of a sequence see all of the sequence's keys, the one before it all but the last, and so on. That is what a
call needs whose own keys stand in order, behind those of its past. They do in a replay, and in a prefill too: all of a
prompt is pinned, at slots in its order.

Registered with transformers under NAME, which callers select where the model has "flash_attention_2". The package is
optional and imported when it is first used.

Shape suffixes: B rows, N queries a row, S keys a row, M packed queries, P packed keys, H heads, K kv heads, D head_dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "pte_flash"
REPLACES = {"flash_attention_2": NAME}


@dataclass
class Packing:
    """Where the packed queries and keys of a call lie among all rows', and where each row's begin."""

    queries_M: Tensor
    keys_P: Tensor
    query_starts: Tensor  # int32 [B + 1]
    key_starts: Tensor  # int32 [B + 1]
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, visible_B1NS: Tensor, valid_BN: Tensor) -> "Packing":
        """From a call's mask (see attention_inputs) and its queries that are not padding."""
        if not valid_BN.any():  # every row idles; nobody reads the result, but FSDP wants gradients to flow
            valid_BN = torch.ones_like(valid_BN)
        seen_BS = (visible_B1NS[:, 0] & valid_BN[..., None]).any(1)
        counts = torch.stack([valid_BN.sum(1), seen_BS.sum(1)])
        starts = nn.functional.pad(counts.cumsum(1), (1, 0)).int()
        most_queries, most_keys = counts.max(1).values.tolist()
        return cls(
            queries_M=valid_BN.flatten().nonzero()[:, 0],
            keys_P=seen_BS.flatten().nonzero()[:, 0],
            query_starts=starts[0].contiguous(),
            key_starts=starts[1].contiguous(),
            most_queries=most_queries,
            most_keys=most_keys,
        )


def flash_attention(
    module: nn.Module,
    query_BHND: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: None,
    packing: Packing,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it; returns [B, N, H, D], zeros where a query is padding."""
    from flash_attn import flash_attn_varlen_func

    rows, heads, queries, width = query_BHND.shape
    query_MHD = query_BHND.transpose(1, 2).flatten(0, 1)[packing.queries_M]
    key_PKD, value_PKD = (t.transpose(1, 2).flatten(0, 1)[packing.keys_P] for t in (key_BKSD, value_BKSD))
    out_MHD = flash_attn_varlen_func(
        query_MHD,
        key_PKD,
        value_PKD,
        packing.query_starts,
        packing.key_starts,
        packing.most_queries,
        packing.most_keys,
        softmax_scale=scaling,
        causal=True,
    )
    empty = out_MHD.new_zeros(rows * queries, heads, width)
    return empty.index_copy(0, packing.queries_M, out_MHD).view(rows, queries, heads, width), None
