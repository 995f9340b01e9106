"""Log-probs and entropy of a call from logits that are spread over the vocabulary.

A rank has the logits of its share of the vocabulary; ranks exchange a maximum and sums of one number a token. Rows
that pad the vocabulary to equal shares stand for no token and are left out.

Left out: the distribution's divergence from a teacher (the warm start runs on the Hugging Face learner).

Shape suffixes: B sequences, N predicting columns of a call, V this rank's share of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl_pte.megatron.collectives import expand, reduce

_NOTHING = -1e30  # a logit of probability zero, whose product with it is zero


def scores(
    logits_BNV: Tensor, targets_BN: Tensor, temperature_B: Tensor, *, vocab_size: int, entropy: bool, group: Any
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets and, if asked for, entropy: float32 [B, N] each, the same on all ranks.

    Args:
        vocab_size: tokens, without padding.
        group: the tensor-parallel ranks.
    """
    share = logits_BNV.shape[-1]
    first = group.rank() * share
    logits_BNV = logits_BNV.float() / temperature_B[:, None, None]
    if first + share > vocab_size:
        token_V = torch.arange(first, first + share, device=logits_BNV.device)
        logits_BNV = logits_BNV.masked_fill(token_V >= vocab_size, _NOTHING)
    highest_BN = logits_BNV.detach().max(-1).values
    dist.all_reduce(highest_BN, op=dist.ReduceOp.MAX, group=group)
    logits_BNV = logits_BNV - highest_BN[..., None]
    log_sum_BN = reduce(logits_BNV.exp().sum(-1), group).log()

    place_BN = targets_BN - first
    mine_BN = (place_BN >= 0) & (place_BN < share)
    picked_BN = logits_BNV.gather(-1, place_BN.clamp(0, share - 1)[..., None])[..., 0]
    picked_BN = reduce(torch.where(mine_BN, picked_BN, 0.0), group)
    if not entropy:
        return picked_BN - log_sum_BN, None
    log_probs_BNV = logits_BNV - expand(log_sum_BN, group)[..., None]
    return picked_BN - log_sum_BN, -reduce((log_probs_BNV.exp() * log_probs_BNV).sum(-1), group)
