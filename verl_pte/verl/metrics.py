"""The ``pte/*`` metrics of a training step.

`RolloutFacts` compares a batch of rollouts with what the learner makes of the same tokens. It is measured on the
first pass over the rollouts after their weights were handed over, while learner and rollout still hold the same ones:
verl's log-prob pass over the whole batch or, where verl skips that (``rollout_correction.bypass_mode``), the step's
first mini-batch. Everything is summed over ranks before it is divided, so neither micro-batches nor ranks of unequal
size bias a mean, and a maximum is one.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_FOLDED_BY_MAX = ("pte/mismatch_max", "pte/peak_cache_tokens", "pte/cache_limit")


def fold(key: str, values: Any) -> float:
    """One number for a step from the values its mini-batches reported."""
    values = values if isinstance(values, (list, tuple)) else [values]
    return max(values) if key in _FOLDED_BY_MAX else sum(values) / len(values)


class RolloutFacts:
    """Sums and maxima over a batch's rollouts; empty until `add`."""

    def __init__(self) -> None:
        self.sums = {"evictions": 0.0, "sequences": 0.0, "mismatch": 0.0, "tokens": 0.0}
        self.maxima = {"peak": 0.0, "limit": 0.0, "mismatch": 0.0}

    def add(
        self,
        log_probs: Sequence[Tensor],
        rollout_log_probs: Sequence[Tensor] | None,
        response_masks: Sequence[Tensor],
        facts: Sequence[dict],
        cache_limits: Sequence[int | None],
    ) -> None:
        """Take a micro-batch: per sequence the learner's and the rollout's log-probs, the mask, what the server said,
        the limit.
        """
        for i, limit in enumerate(cache_limits):
            self.maxima["limit"] = max(self.maxima["limit"], limit or 0)
            # The rows verl adds to fill a batch are made from a real one, whose facts they carry; all they do not have
            # is a token that counts.
            if "num_evictions" in facts[i] and bool(response_masks[i].any()):
                self.sums["evictions"] += facts[i]["num_evictions"]
                self.sums["sequences"] += 1
                self.maxima["peak"] = max(self.maxima["peak"], facts[i]["peak_cache_tokens"])
            if rollout_log_probs is not None:
                mask = response_masks[i].bool()
                difference = (log_probs[i].float() - rollout_log_probs[i].to(log_probs[i].device).float()).abs()[mask]
                self.sums["mismatch"] += float(difference.sum())
                self.sums["tokens"] += difference.numel()
                self.maxima["mismatch"] = max(
                    self.maxima["mismatch"], float(difference.max()) if difference.numel() else 0.0
                )

    def reduce(self, group: dist.ProcessGroup | None, device: Any) -> dict[str, float]:
        """The metrics over all ranks of `group`; keys for which nothing was reported are missing."""
        sums = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=device)
        maxima = torch.tensor(list(self.maxima.values()), dtype=torch.float64, device=device)
        if group is not None:
            dist.all_reduce(sums, group=group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        evictions, sequences, mismatch, tokens = sums.tolist()
        peak, limit, mismatch_max = maxima.tolist()
        metrics: dict[str, float] = {}
        if sequences:
            metrics |= {"pte/evictions_per_seq": evictions / sequences, "pte/peak_cache_tokens": peak}
        if limit:
            metrics["pte/cache_limit"] = limit
        if tokens:
            metrics |= {"pte/mismatch_mean": mismatch / tokens, "pte/mismatch_max": mismatch_max}
        return metrics


def mean_over_sequences(
    values: Sequence[float], weights: Sequence[int], group: dist.ProcessGroup | None, device: Any
) -> float | None:
    """Weighted mean of the values that are not nan, over all ranks; None if all are."""
    known = [(v, w) for v, w in zip(values, weights, strict=True) if v == v]
    total = torch.tensor([sum(v * w for v, w in known), sum(w for _, w in known)], dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(total, group=group)
    weighted, weight = total.tolist()
    return weighted / weight if weight else None
