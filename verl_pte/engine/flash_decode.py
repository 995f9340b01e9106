"""flash-attn for decode steps: of each row one run of slots after the other, put together by their log-sum-exps.

flash-attn's decoding kernel takes of each row of a cache the keys from a first to a last slot. What a row holds may
have a gap, where tokens have left its window's ring (core/cache.py), so under a window every row asks twice, as two
rows of one call on the same cache. One run may be empty. No shape depends on where the runs lie, so a CUDA graph can
hold it.

Registered with transformers under NAME, which attention.py has the engine select where the model has
"flash_attention_2". The package is optional and imported when it is first used.

Shape suffixes: B rows, A runs of all rows, H heads, K kv heads, S slots, D head_dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "pte_flash_decode"


@dataclass
class Runs:
    """Of every row the runs of slots that it sees, first runs of all rows first; int32 [A]."""

    a_row: int  # so many
    rows_A: Tensor
    first_A: Tensor
    end_A: Tensor  # one behind the last; as `first` where a run is empty
    empty_A11: Tensor  # bool

    @classmethod
    def of(cls, visible_B11S: Tensor, window: int | None) -> "Runs":
        """From a decode step's mask (BoundedCache.begin_decode). A row that idles may see one more; nobody reads it."""
        visible_BS, a_row = visible_B11S[:, 0, 0], 1 if window is None else 2
        rows, slots = visible_BS.shape
        edges_BS = nn.functional.pad(visible_BS.int(), (1, 1)).diff()  # S + 1 of them
        at_S = torch.arange(slots + 1, device=visible_BS.device)
        first_BA, end_BA = (
            torch.where(edges_BS == edge, at_S, slots).topk(a_row, largest=False, sorted=True).values
            for edge in (1, -1)
        )
        rows_A = torch.arange(rows, device=visible_BS.device).repeat(a_row)
        first_A, end_A = (slots_BA.T.flatten().int() for slots_BA in (first_BA, end_BA))
        return cls(a_row, rows_A.int(), first_A, end_A, (first_A == end_A)[:, None, None])


def flash_decode(
    module: nn.Module,
    query_BH1D: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: None,
    runs: Runs,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it; returns [B, 1, H, D]."""
    from flash_attn import flash_attn_with_kvcache

    out_A1HD, lse_AH1 = flash_attn_with_kvcache(
        query_BH1D.transpose(1, 2).repeat(runs.a_row, 1, 1, 1),
        key_BKSD.transpose(1, 2),
        value_BKSD.transpose(1, 2),
        cache_seqlens=runs.end_A,
        cache_batch_idx=runs.rows_A,
        cache_leftpad=runs.first_A,
        softmax_scale=scaling,
        return_softmax_lse=True,
    )
    if runs.a_row == 1:
        return out_A1HD, None
    lse_A1H1 = lse_AH1.masked_fill(runs.empty_A11, -torch.inf)[:, None]  # flash-attn gives +inf
    weights_A1H1 = lse_A1H1.unflatten(0, (runs.a_row, -1)).softmax(0).flatten(0, 1)
    return (weights_A1H1 * out_A1HD).unflatten(0, (runs.a_row, -1)).sum(0).to(query_BH1D.dtype), None


AttentionInterface.register(NAME, flash_decode)
