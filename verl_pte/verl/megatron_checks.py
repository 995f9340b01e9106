"""Checks of a run that trains on Megatron; called by checks.py, messages as there."""

from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from verl_pte.verl.requirement import plain, require

TESTED = "0.16.1"
# What verl's YAML always has in `override_transformer_config`, and which says nothing here.
_NAMED_BY_VERL = {"attention_backend": "flash", "recompute_modules": ["core_attn"]}


def check_megatron(config: Any) -> None:
    """Raise ValueError (RuntimeError for the installation) if training on Megatron cannot work as configured."""
    parts = config.actor_rollout_ref
    engine = parts.actor.get("megatron", None)
    if engine is None:
        raise ValueError(
            "actor_rollout_ref.actor.strategy=megatron: the actor block is not Megatron's; choose it with "
            "`model_engine=megatron` (the *_megatron recipes do), not by its strategy"
        )
    if config.trainer.device == "cpu":
        raise ValueError("actor_rollout_ref.actor.strategy=megatron: needs GPUs; with trainer.device=cpu use fsdp2")
    problem = megatron_problem()
    if problem is not None:
        raise RuntimeError(
            f"actor_rollout_ref.actor.strategy=megatron: {problem}; pip install 'megatron-core=={TESTED}'"
        )
    why = "the replay runs a sequence's segments one after the other, and a rank holds whole layers of dense models"
    for key in ("context_parallel_size", "expert_model_parallel_size"):
        require(parts, f"actor.megatron.{key}", 1, why)
    for key in ("expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size"):
        if engine.get(key, None) not in (None, 1):
            raise ValueError(f"actor_rollout_ref.actor.megatron.{key}={engine[key]}: must be null, {why}")
    require(parts, "actor.megatron.dynamic_context_parallel", False, why)
    why = "PTE builds its own model from megatron-core and reads the base from its Hugging Face folder"
    for key, right in (("use_megatron_fsdp", False), ("vanilla_mbridge", False), ("use_dist_checkpointing", False)):
        require(parts, f"actor.megatron.{key}", right, why)
    require(parts, "actor.megatron.use_mbridge", True, "verl's engine insists on it, though no bridge is used")
    require(parts, "actor.megatron.router_replay.mode", "disabled", "PTE supports dense models")
    why = "the replay's adapted linears bypass quantization-aware training"
    require(parts, "actor.megatron.qat.enable", False, why)
    require(parts, "actor.megatron.dtype", "bfloat16", "verl ends a run whose float16 gradients overflow once")
    why = "the adapter's optimizer state is small and stays on the device"
    require(parts, "actor.megatron.optimizer_offload", False, why)
    for block in ("override_ddp_config", "override_transformer_config", "override_mcore_model_config"):
        for key, value in (plain(engine.get(block, None)) or {}).items():
            if value is not None and _NAMED_BY_VERL.get(key) != value:
                raise ValueError(
                    f"actor_rollout_ref.actor.megatron.{block}.{key}={value!r}: must be left out, the replay is "
                    "written for one setting of megatron-core (verl_pte/megatron/config.py)"
                )
    why = (
        "each data-parallel rank keeps the adapter's Adam state, which is small; with torch's Adam megatron-core 0.16 "
        "could not load a distributed one again"
    )
    require(parts, "actor.megatron.use_distributed_optimizer", False, why)
    require(parts, "actor.optim.optimizer", "adam", "the adapter's optimizer")
    if config.algorithm.adv_estimator == "gae":
        raise ValueError(
            "algorithm.adv_estimator=gae: must not need a critic with actor.strategy=megatron, verl's Megatron critic "
            "is built by megatron-bridge, with which this engine was not tried; use grpo, or train on FSDP"
        )
    world = config.trainer.n_gpus_per_node * config.trainer.nnodes
    tensor, pipeline = engine.tensor_model_parallel_size, engine.pipeline_model_parallel_size
    if world % (tensor * pipeline):
        raise ValueError(
            f"actor_rollout_ref.actor.megatron: tensor_model_parallel_size={tensor} x pipeline_model_parallel_size="
            f"{pipeline} must divide the {world} GPUs of trainer.nnodes x trainer.n_gpus_per_node"
        )


def check_megatron_model(config: Any, hf_config: Any) -> None:
    """Raise ValueError unless the base model can be read, and spread as configured."""
    from verl_pte.megatron.base import Weights
    from verl_pte.megatron.config import check_model

    if Path(config.actor_rollout_ref.model.path).is_dir():  # workers download what is on the hub
        Weights(config.actor_rollout_ref.model.path)
    engine = config.actor_rollout_ref.actor.megatron
    check_model(hf_config, tensor=engine.tensor_model_parallel_size, pipeline=engine.pipeline_model_parallel_size)
    attention = (config.actor_rollout_ref.model.get("override_config", None) or {}).get("attn_implementation", "sdpa")
    if attention != "sdpa":
        raise ValueError(
            f"actor_rollout_ref.model.override_config.attn_implementation={attention}: must be sdpa with "
            "actor.strategy=megatron, whose replay has no other"
        )


def megatron_problem() -> str | None:
    """Why this installation cannot train on Megatron, None if it can."""
    try:
        found = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return "megatron-core is not installed"
    if Version(found).release[:2] != Version(TESTED).release[:2]:
        return f"was tested with megatron-core {TESTED}, and found {found}"
    return None
