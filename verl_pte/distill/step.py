"""Self-distillation of one batch: teacher rollouts, then the gradient of the KL from teacher to student.

The method's own objective is that the policy under a bounded cache should act like the one that sees everything
(paper, section 3). Taken at its word, that needs neither labels nor reward: the base model without adapter and with
its full cache answers the prompts, and the adapter under its window is trained to give the same distribution at every
token of those answers. docs/results.md has what it recovers.

Teacher and student are one set of weights, with the adapter switched off and on, so what the teacher thought is kept
as hidden states and turned into logits by the shared output layer, a call at a time (learner/replay.py).

Left out: optimizers, checkpoints and prompts (the rest of this package), and sharded models: the output layer is
called outside the model's forward, where FSDP has not gathered it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from verl_pte.engine import RolloutEngine, RolloutOutput, SamplingParams
from verl_pte.learner import Replay


@dataclass(frozen=True)
class DistillResult:
    """What a batch said."""

    divergence: float  # KL(teacher || student) in nats, mean over response tokens
    num_tokens: int
    update_ratio: float  # as in ReplayOutput; mean over the micro-batches in which something was evicted


class SelfDistillation:
    """Teacher and student of one attached model.

    Args:
        model: from ``verl_pte.attach``, unsharded; its PTEConfig is the student's.
        tokenizer, max_num_seqs, max_prompt_length, max_response_length: of the teacher's `RolloutEngine`.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any = None,
        *,
        max_num_seqs: int,
        max_prompt_length: int,
        max_response_length: int,
    ) -> None:
        self.model = model
        self.full = next(iter(model.peft_config.values())).schedule().full()
        with model.disable_adapter():
            self.engine = RolloutEngine(
                model,
                tokenizer,
                max_num_seqs=max_num_seqs,
                max_prompt_length=max_prompt_length,
                max_response_length=max_response_length,
                schedule=self.full,
            )
        self.engine.sleep()

    def rollouts(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams]
    ) -> list[RolloutOutput]:
        """The teacher's answers. Its cache is allocated for the time of the call."""
        with self.model.disable_adapter():
            self.engine.wake()
            try:
                return self.engine.generate(prompts, sampling)
            finally:
                self.engine.sleep()

    def backward(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        micro_batch: int | None = None,
    ) -> DistillResult:
        """Add to the adapter's gradients those of the KL at every response token, averaged over all of them.

        Args:
            prompts, responses: token ids; the teacher's answers, or any others.
            temperature: of both distributions.
            micro_batch: sequences replayed at once; None is all.
        """
        as_tensors = [[torch.as_tensor(s, dtype=torch.long) for s in sequences] for sequences in (prompts, responses)]
        num_tokens = sum(map(len, responses))
        total, ratios = 0.0, []
        size = micro_batch or len(prompts)
        for start in range(0, len(prompts), size):
            part = [tensors[start : start + size] for tensors in as_tensors]
            replay = Replay(self.model, *part, temperature=temperature, teacher=self._teach(*part))
            found = replay.forward()
            assert found.divergence is not None
            total += float(found.divergence.sum())  # zero beyond a response's end
            replay.backward(None, d_divergence=found.mask / num_tokens)
            if not math.isnan(found.update_ratio):
                ratios.append(found.update_ratio)
        return DistillResult(total / num_tokens, num_tokens, mean(ratios) if ratios else math.nan)

    def _teach(self, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
        """The teacher's hidden states at the response tokens: [B, T, M]."""
        with self.model.disable_adapter():
            hidden = Replay(self.model, prompts, responses, schedule=self.full, keep_hidden=True).forward().hidden
        assert hidden is not None
        return hidden
