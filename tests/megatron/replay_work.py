"""What ranks do for test_replay.py; importable by the processes they are."""

import dataclasses
import gc

import torch
from megatron.core import parallel_state
from megatron_ranks import (
    Layout,
    batch,
    build,
    from_last_stage,
    gradients,
    hf_model,
    new_model,
    replay,
    score_gradients,
    wrapped,
)
from saved_bytes import SavedBytes

from verl_pte.megatron import placement
from verl_pte.megatron.replay import MegatronReplay


def replay_half(layout: Layout, halves: list[dict]) -> dict:
    return replay(dataclasses.replace(layout, **halves[parallel_state.get_data_parallel_rank()]))


def new_adapter(layout: Layout) -> dict:
    groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    return {name: tensor.clone() for name, tensor in placement.full_tensors(new_model(layout), *groups)}


def two_replays(layout: Layout, parts: list[dict]) -> dict:
    model = build(layout)
    ddp = wrapped(model)
    for index, part in enumerate(parts):
        piece = dataclasses.replace(layout, **part)
        run = MegatronReplay(ddp, *batch(piece), temperature=0.7, entropy=True)
        run.forward()
        run.backward(*score_gradients(piece), last=index == len(parts) - 1)
    return gradients(model)


def reference(layout: Layout) -> torch.Tensor:
    model = build(layout)
    found = MegatronReplay(model, *batch(layout), adapter=False, schedule=model.pte.schedule().full()).forward()
    return from_last_stage(None if found is None else found.log_probs)


def resave(layout: Layout, base_folder: str, adapter: str, output: str) -> list[str]:
    """Load base and adapter from disk, write the adapter again; names of what would be sent to a rollout."""
    from transformers import AutoConfig

    from verl_pte.megatron import base
    from verl_pte.megatron.config import transformer_config
    from verl_pte.megatron.model import PTEGPTModel
    from verl_pte.peft.saved import saved_config
    from verl_pte.verl.megatron_checkpoint import load_adapter, save_adapter

    hf = AutoConfig.from_pretrained(base_folder)
    model = PTEGPTModel(
        hf,
        saved_config(adapter),
        transformer_config(hf, tensor=layout.tensor, pipeline=layout.pipeline, on_cpu=True),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    base.load(model, base.Weights(base_folder), groups[0])
    load_adapter(model, adapter)
    save_adapter(model, output)
    return [name for name, _ in placement.full_tensors(model, *groups)]


def saved_bytes(layout: Layout, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(most bytes autograd held at once, bytes of the K/V store) of a backward, for responses of each length."""
    hf, found = hf_model(layout), []
    hf.config.max_position_embeddings = 16384
    for length in lengths:
        gc.collect()
        model = build(layout, hf)
        ddp = wrapped(model)
        run = MegatronReplay(ddp, *batch(dataclasses.replace(layout, prompts=(11,), responses=(length,))))
        scores = run.forward()
        with SavedBytes(model) as saved:
            run.backward(None if scores is None else torch.ones_like(scores.log_probs))
        found.append((saved.peak, run.ledger.num_bytes))
    return found


def without_base(layout: Layout) -> list[str]:
    """Names of what is sent while the base is on another device than the adapter."""
    model = build(layout)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter.to("meta"), requires_grad=False))
    groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    return [name for name, tensor in placement.full_tensors(model, *groups) if tensor.device.type == "cpu"]
