"""Sampling: what a request asks for, and one draw per sequence from a batch of logits.

Field names are vLLM's. Every sequence draws from its own random stream, one uniform number a token, so what it
samples does not depend on its neighbours. Left out: penalties, beams, logit processors.

Shape suffixes: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_pte.core.transfer import upload


@dataclass(frozen=True)
class SamplingParams:
    """How to sample the responses of one prompt.

    Args:
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        max_tokens: response tokens at most, the stop token included.
        seed: of the first response's random stream; response i of n uses seed + i. None: not reproducible.
        n: responses per prompt.
        stop_token_ids: end a response besides the end-of-sequence token; the stop token is part of the response.
        ignore_eos: do not stop at the end-of-sequence token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 16
    seed: int | None = None
    n: int = 1
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature!r}: must be >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}: must be in (0, 1]")
        if self.top_k < -1:
            raise ValueError(f"top_k={self.top_k!r}: must be positive, or 0 or -1 for all tokens")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens!r}: must be at least 1")
        if self.n < 1:
            raise ValueError(f"n={self.n!r}: must be at least 1")


def sample(logits_BV: Tensor, params: Sequence[SamplingParams], uniform_B: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Returns (tokens [B], log-probs [B] float32). A log-prob is of the distribution after temperature and before top-k
    and top-p; greedy rows are scored at temperature 1.
    """
    device = logits_BV.device
    greedy_B = upload([p.temperature == 0 for p in params], device)
    temperature_B = upload([p.temperature or 1.0 for p in params], device)
    log_probs_BV = (logits_BV.float() / temperature_B[:, None]).log_softmax(-1)
    best_B = log_probs_BV.argmax(-1)
    if all(p.temperature == 0 for p in params):
        tokens_B = best_B
    else:
        probs_BV = _restrict(log_probs_BV, params).double()
        cumulative_BV = probs_BV.cumsum(-1)
        u_B = upload(uniform_B, device, torch.float64) * cumulative_BV[:, -1]
        drawn_B = torch.searchsorted(cumulative_BV, u_B[:, None], right=True)[:, 0]
        # Rounding may put u on the total: fall back to the last token that can be drawn.
        last_B = probs_BV.shape[-1] - 1 - (probs_BV > 0).flip(-1).int().argmax(-1)
        tokens_B = torch.where(greedy_B, best_B, torch.minimum(drawn_B, last_B))
    return tokens_B, log_probs_BV.gather(1, tokens_B[:, None])[:, 0]


def _restrict(log_probs_BV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities with what top-k and top-p exclude set to zero (not renormalised)."""
    probs_BV = log_probs_BV.exp()
    vocab = probs_BV.shape[-1]
    if all(p.top_p == 1 and p.top_k in (0, -1) for p in params):
        return probs_BV
    device = probs_BV.device
    k_B = upload([vocab if p.top_k in (0, -1) else min(p.top_k, vocab) for p in params], device)
    p_B = upload([p.top_p for p in params], device)
    sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of everything likelier
    # A row with top_p = 1 keeps everything, whatever its sum rounds to.
    keep_BV = (before_BV < p_B[:, None]) | (p_B[:, None] == 1)
    keep_BV &= torch.arange(vocab, device=device) < k_B[:, None]
    return probs_BV * torch.zeros_like(keep_BV).scatter(1, order_BV, keep_BV)
