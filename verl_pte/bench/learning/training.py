"""Adapters in training: one optimizer, one schedule of learning rates, and three ways to get a gradient.

    supervised   cross entropy of the right thought, its answer weighing more
    distilled    KL from the full-cache base on its own rollouts, without labels (verl_pte/distill)
    grpo         group-relative outcome reward on the model's own rollouts, with an optional KL to the base

All go through the native engine and the learner's replay. Each function adds the gradients of one step and returns
what it measured. Left out: verl, whose own loop runs the same three parts (recipes/).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from verl_pte.bench.learning.base import TrainingFailure
from verl_pte.bench.learning.tasks import Example, Task
from verl_pte.distill import SelfDistillation
from verl_pte.engine import RolloutEngine, SamplingParams
from verl_pte.learner import Replay
from verl_pte.peft import pte_config

Step = Callable[[int], dict[str, float]]
BETAS = (0.9, 0.98)
LOWEST = 0.1  # of the highest learning rate, at a cosine's end
_TEACHER_STEPS = 8


@dataclass(frozen=True)
class Optimization:
    """AdamW without weight decay, gradients clipped to norm 1.

    Attributes:
        steps: of the optimizer.
        lr: highest; reached after `warmup` steps, then, with `cosine`, down to a tenth.
        encoder_lr: of the thought encoders, as a multiple of `lr`.
    """

    steps: int
    lr: float
    warmup: int = 20
    cosine: bool = True
    encoder_lr: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup)
        return self.lr * warm * self._decay(step)

    def _decay(self, step: int) -> float:
        if not self.cosine:
            return 1.0
        return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def optimize(model: nn.Module, settings: Optimization, step: Step) -> Iterator[tuple[int, dict[str, float]]]:
    """Train; yields each step's measurements, with the gradients' norm."""
    encoders = [p for n, p in model.named_parameters() if p.requires_grad and "encoder" in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "encoder" not in n]
    groups = [{"params": others, "scale": 1.0}] + [{"params": encoders, "scale": settings.encoder_lr}] * bool(encoders)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=BETAS)
    for i in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(i) * group["scale"]
        optimizer.zero_grad()
        measured = step(i)
        norm = nn.utils.clip_grad_norm_([*others, *encoders], 1.0)
        if not torch.isfinite(norm):
            raise TrainingFailure(f"step {i}: the gradients are not finite")
        optimizer.step()
        yield i, measured | {"grad_norm": float(norm)}


def drawn(task: Task, works: tuple[int, int], count: int, seed: int, step: int) -> list[Example]:
    """Examples of one step: a function of seed and step, so that methods see the same ones."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
    spread = torch.randint(works[0], works[1] + 1, (count,), generator=generator).tolist()
    return task.examples(spread, generator)


def supervised(model: nn.Module, task: Task, works: tuple[int, int], batch: int, seed: int) -> Step:
    """Cross entropy: mean over the answer's values plus half the mean over all of the thought."""

    def step(index: int) -> dict[str, float]:
        examples = drawn(task, works, batch, seed, index)
        replay = Replay(model, *_tensors([e.prompt for e in examples], [e.thought for e in examples]))
        found = replay.forward()
        weight_BT = torch.zeros_like(found.log_probs)
        for b, example in enumerate(examples):
            values = slice(example.answer_start + 1, len(example.thought) - 1, 2)
            weight_BT[b, : len(example.thought)] = 0.5 / len(example.thought)
            weight_BT[b, values] += 1.0 / len(range(*values.indices(len(example.thought))))
        replay.backward(-weight_BT / batch)
        return {"loss": float(-(weight_BT * found.log_probs).sum() / batch), "update_ratio": found.update_ratio}

    return step


def distilled(model: nn.Module, task: Task, works: tuple[int, int], batch: int, seed: int) -> Step:
    """KL to the full-cache base on its greedy rollouts."""
    distillation = SelfDistillation(
        model,
        max_num_seqs=batch * _TEACHER_STEPS,
        max_prompt_length=task.prompt_length,
        max_response_length=task.thought_length(works[1]) + 8,
    )
    waiting: dict[int, tuple[list[list[int]], list[list[int]]]] = {}  # prompts and rollouts of the steps to come

    def step(index: int) -> dict[str, float]:
        if index not in waiting:  # the teacher does not change: one call rolls out for several steps
            steps = range(index, index + _TEACHER_STEPS)
            examples = [e for i in steps for e in drawn(task, works, batch, seed, i)]
            sampling = [SamplingParams(temperature=0, max_tokens=len(e.thought) + 8) for e in examples]
            prompts = [e.prompt for e in examples]
            responses = [o.token_ids for o in distillation.rollouts(prompts, sampling)]
            for i, at in zip(steps, range(0, len(prompts), batch), strict=True):
                waiting[i] = (prompts[at : at + batch], responses[at : at + batch])
        result = distillation.backward(*waiting.pop(index))
        return {"loss": result.divergence, "update_ratio": result.update_ratio}

    return step


@dataclass(frozen=True)
class GRPO:
    """Settings of `grpo`.

    Attributes:
        prompts, group: per step; `group` responses each.
        kl: coefficient of verl's `low_var_kl` to the base on the sampled tokens.
        full_reference: the base has its full cache (`reference_cache: full`).
        rewarded: without, the KL alone is left: distillation on the model's own samples.
    """

    prompts: int = 16
    group: int = 8
    kl: float = 0.0
    full_reference: bool = True
    rewarded: bool = True


def grpo(model: nn.Module, task: Task, works: tuple[int, int], settings: GRPO, seed: int) -> Step:
    """One on-policy step: advantages within groups, loss averaged over tokens as verl's default does."""
    schedule = pte_config(model).schedule()
    engine = RolloutEngine(
        model,
        max_num_seqs=settings.prompts * settings.group,
        max_prompt_length=task.prompt_length,
        max_response_length=task.thought_length(works[1]) + 8,
    )

    def step(index: int) -> dict[str, float]:
        examples = drawn(task, works, settings.prompts, seed, index)
        seeds = [(seed * 100_003 + index) * 1009 * settings.prompts + i * 1009 for i in range(settings.prompts)]
        sampling = [
            SamplingParams(max_tokens=len(e.thought) + 8, n=settings.group, seed=s)
            for e, s in zip(examples, seeds, strict=True)
        ]
        outputs = engine.generate([e.prompt for e in examples], sampling)
        scores = [task.score(examples[o.prompt_index], o.token_ids) for o in outputs]
        rewards_PG = torch.tensor([s.answer for s in scores]).view(settings.prompts, settings.group)
        advantages = (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-6)
        advantages_B = advantages.flatten() * settings.rewarded
        # Without a KL what has no advantage has no gradient either.
        used = [b for b in range(len(outputs)) if settings.kl or advantages_B[b] != 0]
        measured = {
            "reward": float(rewards_PG.mean()),
            "chain": sum(s.chain for s in scores) / len(scores),
            "early": sum(s.early for s in scores) / len(scores),
            "length": sum(len(o.token_ids) for o in outputs) / len(outputs),
        }
        if not used:
            return measured
        num_tokens = sum(len(o.token_ids) for o in outputs)
        pairs = _tensors([examples[outputs[b].prompt_index].prompt for b in used], [outputs[b].token_ids for b in used])
        replay = Replay(model, *pairs)
        found = replay.forward()
        sampled = [outputs[b].log_probs for b in used]
        mismatch = [(found.log_probs[i, : len(p)] - torch.tensor(p)).abs().max().item() for i, p in enumerate(sampled)]
        gradient_BT = -advantages_B[used][:, None] * found.mask / num_tokens
        if settings.kl:
            with model.disable_adapter():
                reference = Replay(model, *pairs, schedule=schedule.full() if settings.full_reference else schedule)
                ratio_BT = (reference.forward().log_probs - found.log_probs).clamp(-20, 20)
            gradient_BT = gradient_BT + settings.kl * (1 - ratio_BT.exp()) * found.mask / num_tokens
            measured["kl"] = float(((ratio_BT.exp() - ratio_BT - 1) * found.mask).sum() / num_tokens)
        replay.backward(gradient_BT)
        return measured | {"mismatch": max(mismatch), "update_ratio": found.update_ratio}

    return step


def _tensors(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.tensor(p) for p in prompts], [torch.tensor(r) for r in responses]
