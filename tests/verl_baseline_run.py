"""One step each of the learner benchmark's two baselines; importable, so that a process can be spawned with it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_pte.bench.learner_settings import LearnerSettings


def exercise(rank: int, settings: LearnerSettings, folder: Path) -> None:
    """What verl's engine and plain PEFT make of one micro-batch with the same LoRA weights, to ``folder/found.pt``."""
    from verl_pte.bench.learner_steps import PeftStep, make_batch
    from verl_pte.bench.models import VOCAB, make_models
    from verl_pte.bench.verl_baseline import VerlStep

    torch.set_num_threads(1)
    make_models(settings, folder)
    batch = make_batch(settings, VOCAB, settings.lengths[0])
    peft, verl = PeftStep(settings, folder), VerlStep(settings, folder)
    random = torch.Generator().manual_seed(3)
    weights = {
        name: torch.empty(p.shape).normal_(std=p.shape[1] ** -0.5, generator=random)
        for name, p in _lora(peft.model).items()
    }
    found: dict[str, Any] = {}
    for baseline, step, model in (("peft", peft, peft.model), ("verl", verl, verl.engine.module)):
        parameters = _lora(model)
        assert parameters.keys() == weights.keys()
        assert model.config._attn_implementation == settings.attention
        with torch.no_grad():
            for name, parameter in parameters.items():
                _whole(parameter).copy_(weights[name])
        step.prepare(batch)
        if baseline == "verl":  # it drops the gradients when the training mode is left
            verl.engine.optimizer_zero_grad = lambda: None
        loss = step.run()["loss"]
        found[baseline] = {"loss": loss, **{name: _whole(p.grad).clone() for name, p in parameters.items()}}
    torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


def _lora(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def _whole(tensor: Any) -> Tensor:
    """All of a tensor that one rank holds alone."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
