"""The learner's step of each method behind one face: log-probs of a micro-batch, one loss on them, gradients.

LoRA_c and PTE run the project's replay. The full cache runs verl's engine (verl_baseline.py) or, where verl is missing,
plain PEFT LoRA on the transformers model, all tokens at once. The loss is the same everywhere: a policy gradient with
random advantages, averaged over the response tokens. Left out: the optimizer, and timing (learner_worker.py).

Shape suffixes: B sequences, T response tokens, L prompt and response tokens, V vocabulary.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from verl_pte.bench.engines import native_device
from verl_pte.bench.learner_settings import LearnerSettings
from verl_pte.bench.models import random_prompts
from verl_pte.learner import Replay

# Adapters of a bfloat16 model compute in bfloat16, as verl's mixed precision has it; PEFT alone would take float32.
SAME_DTYPE = {"autocast_adapter_dtype": False}


class Batch(NamedTuple):
    """A micro-batch of equal lengths."""

    prompts: list[Tensor]
    responses: list[Tensor]
    weights_BT: Tensor  # what the loss multiplies log-probs with


class Step(Protocol):
    """One method, ready to run.

    Attributes:
        device: where it runs.
        runs: what runs, in words.
    """

    device: torch.device
    runs: str

    def prepare(self, batch: Batch) -> None:
        """What is no part of the step: gradients are gone, the batch is where it is needed."""

    def run(self) -> dict[str, Any]:
        """Forward and backward; says what is worth knowing of them."""


def make_step(settings: LearnerSettings, method: str, models: Path) -> Step:
    """The step of a method, with weights from `models.make_models`."""
    if method != "full":
        return ReplayStep(settings, method, models)
    if settings.runs_verl:
        from verl_pte.bench.verl_baseline import VerlStep

        return VerlStep(settings, models)
    return PeftStep(settings, models)


def make_batch(settings: LearnerSettings, vocab_size: int, length: int) -> Batch:
    """Random tokens and advantages, the same for every method."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    responses = torch.randint(0, vocab_size, (settings.num_seqs, length), generator=generator)
    advantages_BT = torch.randn(settings.num_seqs, length, generator=generator)
    prompts = [torch.tensor(prompt) for prompt in random_prompts(settings, vocab_size)]
    return Batch(prompts, list(responses), -advantages_BT / advantages_BT.numel())


class ReplayStep:
    """Both passes of the replay."""

    def __init__(self, settings: LearnerSettings, method: str, models: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        import verl_pte.peft  # noqa: F401  registers the method with PEFT

        self.device, self.chunk_tokens = torch.device(native_device(settings)), settings.chunk_tokens
        dtype = getattr(torch, settings.dtype)
        base = AutoModelForCausalLM.from_pretrained(
            models / "base", dtype=dtype, attn_implementation=settings.attention
        )
        model = PeftModel.from_pretrained(base, models / method, is_trainable=True, **SAME_DTYPE)
        self.model = model.to(self.device).train()
        self.runs = f"streamed replay, {settings.attention}, chunks of at most {self.chunk_tokens} tokens"

    def prepare(self, batch: Batch) -> None:
        """Gradients go; the replay takes the batch from the host."""
        self.model.zero_grad(set_to_none=True)
        self.batch = batch

    def run(self) -> dict[str, Any]:
        """Forward, the loss on log-probs as leaves, backward."""
        prompts, responses, weights_BT = self.batch
        replay = Replay(self.model, prompts, responses, chunk_tokens=self.chunk_tokens)
        found = replay.forward()
        log_probs = found.log_probs.requires_grad_()
        loss = (log_probs * weights_BT.to(self.device)).sum()
        loss.backward()
        assert log_probs.grad is not None
        replay.backward(log_probs.grad)
        return {
            "loss": loss.item(),
            "evictions": max(found.num_evictions),
            "calls": replay.num_calls,
            "store_bytes": replay.store_bytes,
        }


class PeftStep:
    """Plain LoRA of PEFT, all tokens at once: the logits of every position, then their log-probs in float32."""

    def __init__(self, settings: LearnerSettings, models: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.device = torch.device(native_device(settings))
        dtype = getattr(torch, settings.dtype)
        base = AutoModelForCausalLM.from_pretrained(
            models / "base", dtype=dtype, attn_implementation=settings.attention
        )
        base.enable_input_require_grads()
        if settings.checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(settings.seed)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules="all-linear")
        self.model = get_peft_model(base, config, **SAME_DTYPE).to(self.device).train()
        checkpointing = "with" if settings.checkpointing else "without"
        self.runs = f"PEFT LoRA on the transformers model, {settings.attention}, {checkpointing} gradient checkpointing"

    def prepare(self, batch: Batch) -> None:
        """Gradients go, the batch goes to the device."""
        self.model.zero_grad(set_to_none=True)
        rows = [torch.cat(pair) for pair in zip(batch.prompts, batch.responses, strict=True)]
        self.tokens_BL = torch.stack(rows).to(self.device)
        self.weights_BT = batch.weights_BT.to(self.device)

    def run(self) -> dict[str, Any]:
        """Forward and backward."""
        length = self.weights_BT.shape[1]
        logits_BLV = self.model(input_ids=self.tokens_BL, use_cache=False).logits
        logits_BTV = logits_BLV[:, -length - 1 : -1].float()
        picked_BT = logits_BTV.gather(-1, self.tokens_BL[:, -length:, None])[..., 0]
        loss = ((picked_BT - logits_BTV.logsumexp(-1)) * self.weights_BT).sum()
        loss.backward()
        return {"loss": loss.item()}
