"""WarmStart: a run of self-distillation, from prompts to a saved adapter, that can be stopped and goes on.

Each step the teacher answers the step's prompts, the student takes one AdamW step on the KL at every token of the
answers (step.py), and a line is logged. What a step does depends on its number (plan.py) and on the checkpoint's
tensors alone, so that a run that was killed ends in the same adapter. Left out: the command line (cli/warm_start.py).
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from verl_pte.distill.folder import RunFolder
from verl_pte.distill.plan import Plan
from verl_pte.distill.prompts import Prompts
from verl_pte.distill.ranks import Ranks
from verl_pte.distill.settings import WarmStartSettings
from verl_pte.distill.step import SelfDistillation
from verl_pte.engine import SamplingParams
from verl_pte.peft.saved import load


@dataclass(frozen=True)
class StepRecord:
    """A line of the log."""

    step: int  # steps done, this one included
    kl: float  # KL(teacher || student) before the step's update, nats, mean over response tokens
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # of the teacher's answers
    cut: int  # of those answers, how many were cut off at the longest length
    update_ratio: float | None  # mean ||S'|| / ||S||, S' before rescaling; None if nothing was evicted
    seconds: float


def load_student(settings: WarmStartSettings, device: torch.device) -> PeftModel:
    """The base with a new adapter, the same for the same seed. Raises ValueError for a base in float16."""
    dtype = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        student = load(settings.model, None, copy.deepcopy(settings.pte), dtype)  # PEFT writes to its config
    if student.dtype == torch.float16:
        raise ValueError(
            f"--dtype {settings.dtype}: the weights of {settings.model} are float16, in which gradients vanish; use "
            "bfloat16 or float32"
        )
    return student.to(device)


class WarmStart:
    """One run, or the rest of one.

    Args:
        model: from `load_student`; the adapter of the folder's checkpoint is loaded into it.
        folder: checked to be this run's, or nobody's; `run` claims it.
    """

    def __init__(
        self,
        settings: WarmStartSettings,
        prompts: Prompts,
        model: PeftModel,
        tokenizer: Any,
        folder: RunFolder,
        ranks: Ranks,
    ) -> None:
        if settings.batch_size < ranks.size:
            raise ValueError(f"--batch-size {settings.batch_size}: must be at least {ranks.size}, the number of ranks")
        self.settings, self.prompts, self.model, self.folder, self.ranks = settings, prompts, model, folder, ranks
        self.plan = Plan(
            num_prompts=len(prompts.token_ids),
            batch_size=settings.batch_size,
            steps=settings.steps,
            lr=settings.lr,
            warmup_steps=settings.warmup_steps,
            seed=settings.seed,
        )
        share = math.ceil(settings.batch_size / ranks.size)
        self.distillation = SelfDistillation(
            model,
            tokenizer,
            max_num_seqs=min(settings.max_num_seqs or share, share),
            max_prompt_length=settings.max_prompt_length,
            max_response_length=settings.max_response_length,
        )
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=settings.lr, weight_decay=0.0)
        self.steps_done = self._resume()

    def run(self, on_step: Callable[[StepRecord], None] = lambda record: None) -> None:
        """Do the steps that are left and write the adapter. `on_step` sees every record."""
        if self.ranks.is_first:
            self.folder.claim(self.settings.identity(self.prompts.digest()))
            self.folder.cut_log(self.steps_done)
        for step in range(self.steps_done, self.settings.steps):
            record = self._step(step)
            self.steps_done = record.step
            if self.ranks.is_first:
                self.folder.add(asdict(record))
                if record.step % self.settings.save_every == 0 or record.step == self.settings.steps:
                    self._save()
            on_step(record)
        if self.ranks.is_first:
            self.folder.finish(self.model)

    def _step(self, step: int) -> StepRecord:
        started = time.perf_counter()
        own = [(i, prompt) for i, prompt in enumerate(self.plan.batch(step))][self.ranks.rank :: self.ranks.size]
        prompts = [self.prompts.token_ids[prompt] for _, prompt in own]
        sampling = [
            SamplingParams(
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                max_tokens=self.settings.max_response_length,
                seed=self.plan.answer_seed(step, i),
            )
            for i, _ in own
        ]
        outputs = self.distillation.rollouts(prompts, sampling)
        answers = [output.token_ids for output in outputs]
        self.optimizer.zero_grad()
        found = self.distillation.backward(prompts, answers, micro_batch=self.settings.micro_batch)
        ratio, has_ratio = (0.0, 0) if math.isnan(found.update_ratio) else (found.update_ratio, 1)
        num_cut = sum(output.finish_reason == "length" for output in outputs)
        tokens, divergence, ratios, num_ratios, cut = self.ranks.sum(
            found.num_tokens, found.divergence * found.num_tokens, ratio, has_ratio, num_cut
        )
        self.ranks.sum_gradients(self.parameters.values(), found.num_tokens / tokens)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step + 1}: the gradient's norm is {norm}; the run can go on from its last checkpoint, but will "
                "come here again: try another --dtype, a lower --lr or another --seed in a new folder"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate(step)
        self.optimizer.step()
        return StepRecord(
            step=step + 1,
            kl=divergence / tokens,
            grad_norm=norm,
            lr=self.plan.learning_rate(step),
            tokens=int(tokens),
            cut=int(cut),
            update_ratio=ratios / num_ratios if num_ratios else None,
            seconds=time.perf_counter() - started,
        )

    # -- checkpoints
    # -----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        adapter = {name: parameter.detach().cpu() for name, parameter in self.parameters.items()}
        self.folder.save({"steps": self.steps_done, "adapter": adapter, "optimizer": self.optimizer.state_dict()})

    def _resume(self) -> int:
        state = self.folder.load(self.ranks.device)
        if state is not None:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(state["adapter"][name])
            self.optimizer.load_state_dict(state["optimizer"])
        steps = 0 if state is None else state["steps"]
        if not self.ranks.agree(steps):
            raise ValueError(
                f"--output {self.folder.path}: rank {self.ranks.rank} finds {steps} steps done there, other ranks "
                "another number; it must be a folder that all of them share"
            )
        return steps
