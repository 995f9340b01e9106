"""The base model: a small Qwen2, trained with full attention until it solves its task.

It stands for the pretrained model of a real run, which can do the reasoning as long as it sees all of it. Everything
else in this benchmark freezes it. Kept on disk by task, sizes and seed, so that methods share one base.

Left out: adapters (training.py).
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from verl_pte.bench.learning.tasks import EOS, Task

GOOD = 0.999  # teacher-forced share of right answers and chain tokens that ends training, forty batches running


@dataclass(frozen=True)
class BaseSettings:
    """What a base is made of.

    Attributes:
        hidden_size, layers: heads are of 16 dimensions, half as many kv heads.
        works: fewest and most work steps of the examples trained on, by which the bounded methods are trained too.
        longest: most work steps of some examples, so that the base works at lengths which its adapters never saw.
        steps, batch, lr: of AdamW; steps are a limit.
    """

    hidden_size: int = 64
    layers: int = 3
    works: tuple[int, int] = (0, 24)
    longest: int | None = None
    steps: int = 2500
    batch: int = 64
    lr: float = 3e-3
    seed: int = 0


class TrainingFailure(RuntimeError):
    """Training that ended without a model: a finding, and no fault of the machine."""


def trained_base(task: Task, settings: BaseSettings, folder: Path, progress: Any = None) -> PreTrainedModel:
    """The base of these settings, from `folder` if it is there.

    Raises TrainingFailure if it does not learn its task. A note of that is kept in its place, so that it is not tried
    again for every cell; to try it anew, remove the note and the cells that say so.
    """
    path = base_path(task, settings, folder)
    failure = path.with_suffix(".failure")
    if not (path / "config.json").exists():
        if failure.exists():
            raise TrainingFailure(failure.read_text())
        model = untrained(task, settings)
        try:
            _train(model, task, settings, progress or (lambda text, done: None))
        except TrainingFailure as error:
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(str(error))
            raise
        scratch = path.with_suffix(".partial")
        model.save_pretrained(scratch)
        scratch.rename(path)
    return Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def base_path(task: Task, settings: BaseSettings, folder: Path) -> Path:
    """Where the base of these settings is kept."""
    key = json.dumps([dataclasses.asdict(task), dataclasses.asdict(settings)], sort_keys=True)
    return folder / f"{task.kind}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


def base_digest(task: Task, settings: BaseSettings, folder: Path) -> str:
    """Which base it is: the same training ends in other weights on another kind of machine, by rounding."""
    return hashlib.sha256((base_path(task, settings, folder) / "model.safetensors").read_bytes()).hexdigest()[:12]


def untrained(task: Task, settings: BaseSettings) -> PreTrainedModel:
    """A base before its training."""
    torch.manual_seed(settings.seed)
    longest = max(settings.works[1], settings.longest or 0)
    heads = settings.hidden_size // 16
    config = Qwen2Config(
        vocab_size=task.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=task.prompt_length + task.thought_length(max(longest, task.max_work)) + 16,
        initializer_range=settings.hidden_size**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=EOS,
    )
    return Qwen2ForCausalLM(config)


def _train(model: PreTrainedModel, task: Task, settings: BaseSettings, progress: Any) -> None:
    generator = torch.Generator().manual_seed(settings.seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.98))
    model.train()
    answer = chain = 0.0
    good = 0
    for step in range(settings.steps):
        warm, cosine = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * warm * (0.05 + 0.95 * cosine)
        # All examples of a batch are of one length: nothing to pad.
        high = settings.longest if settings.longest is not None and step % 2 else settings.works[1]
        work = int(torch.randint(settings.works[0], high + 1, (1,), generator=generator))
        examples = task.examples([work] * settings.batch, generator)
        tokens_BL = torch.tensor([e.prompt + e.thought for e in examples])
        prompt, start = len(examples[0].prompt), examples[0].answer_start
        logits_BTV = model(input_ids=tokens_BL[:, :-1]).logits[:, prompt - 1 :]
        target_BT = tokens_BL[:, prompt:]
        loss_BT = cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="none").view_as(target_BT)
        loss = loss_BT.mean() + 0.3 * loss_BT[:, start + 1 :: 2].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right_BT = logits_BTV.argmax(-1) == target_BT
        answer, chain = right_BT[:, start + 1 : -1 : 2].float().mean().item(), right_BT[:, :start].float().mean().item()
        good = good + 1 if min(answer, chain) > GOOD else 0
        progress(f"base: answer {answer:.2f}, chain {chain:.2f}", 1)
        if good == 40:
            return
    if min(answer, chain) < 0.9:
        raise TrainingFailure(
            f"the base did not learn {task.kind} in {settings.steps} steps: answer {answer:.2f}, chain {chain:.2f}"
        )
