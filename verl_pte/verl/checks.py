"""Checks of a whole run's configuration, before anything starts.

Every message names the key, its value and what would be right. Settings of the ``model`` block alone are checked with
it (config.py); here are those between blocks, and what only the model's own config file can tell.
"""

from collections.abc import Mapping
from typing import Any

from verl_pte.verl.components import AGENT_LOOP, MODEL_TARGET, ROLLOUT, ROLLOUTS, is_pte_model
from verl_pte.verl.config import check_model_settings, parse_pte_block, require_plugin


def check_run(config: Any) -> None:
    """Raise ValueError (RuntimeError for the installation) if a run that mentions PTE cannot work."""
    require_plugin()
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    if not is_pte_model(model):
        raise ValueError(
            f"actor_rollout_ref.rollout.name={rollout.name}: serves PTE models only; set "
            f"actor_rollout_ref.model._target_={MODEL_TARGET} (recipes/pte_grpo.yaml does), or use rollout.name=vllm"
        )
    if rollout.name not in ROLLOUTS:
        raise ValueError(
            f"actor_rollout_ref.rollout.name={rollout.name}: cannot serve a PTE model, its cache and thought state are "
            f"unknown to it; use {' or '.join(ROLLOUTS)}"
        )
    pte = parse_pte_block(_plain(model.get("pte", {})))
    check_model_settings(model, pte)
    _check_trainer(config)
    if rollout.name == ROLLOUT:
        _check_native_rollout(rollout)
    _check_model_files(config, pte)


def _check_trainer(config: Any) -> None:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    for key in ("actor.ulysses_sequence_parallel_size", "actor.fsdp_config.ulysses_sequence_parallel_size"):
        _require(
            config.actor_rollout_ref, key, 1, "the replay runs a sequence's segments one after the other on one rank"
        )
    why = "under FSDP2's own offloading parameters are never where the replay computes; use param_offload instead"
    _require(config.actor_rollout_ref, "actor.fsdp_config.offload_policy", False, why)
    _require(config.actor_rollout_ref, "actor.use_prefix_grouper", False, "it needs packed sequences")
    _require(
        config.actor_rollout_ref,
        "actor.calculate_sum_pi_squared",
        False,
        "the replay returns log-probs and entropy only",
    )
    if "hf_model" in actor.checkpoint.get("save_contents", ()):
        raise ValueError(
            f"actor_rollout_ref.actor.checkpoint.save_contents={list(actor.checkpoint.save_contents)}: must not "
            "contain hf_model, a PTE adapter cannot be merged into it; every checkpoint holds a PEFT adapter in "
            "actor/pte_adapter"
        )
    if config.get("distillation", None) is not None and config.distillation.get("enabled", False):
        raise ValueError("distillation.enabled=True: must be False, the PTE engine returns no logits to distil")
    mode = config.trainer.get("v1", {}).get("trainer_mode", "sync")
    if mode != "sync":
        raise ValueError(
            f"trainer.v1.trainer_mode={mode}: must be sync. The others resume an interrupted rollout with its "
            "tokens as "
            "part of the prompt, which PTE would never evict: rollout and learner would see different caches"
        )
    why = "a later turn would make earlier answers part of the prompt, which PTE never evicts"
    _require(config.actor_rollout_ref, "rollout.multi_turn.enable", False, why)
    loop = rollout.agent.get("default_agent_loop", AGENT_LOOP)
    if loop not in (AGENT_LOOP, "single_turn_agent"):
        raise ValueError(f"actor_rollout_ref.rollout.agent.default_agent_loop={loop}: must be {AGENT_LOOP}; {why}")


def _check_native_rollout(rollout: Any) -> None:
    why = "the native engine is data parallel: one replica on each device (rollout.name=pte_vllm shards a model)"
    for key in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "data_parallel_size",
        "expert_parallel_size",
    ):
        _require(rollout, key, 1, why, prefix="actor_rollout_ref.rollout.")
    for engine, options in (rollout.get("engine_kwargs", None) or {}).items():
        if engine != ROLLOUT and options:
            raise ValueError(
                f"actor_rollout_ref.rollout.engine_kwargs.{engine}={_plain(options)}: must be empty, the native engine "
                f"has no {engine} options; its own are in engine_kwargs.pte (num_threads, compile)"
            )
        for key in () if engine != ROLLOUT else options or ():
            if key not in ("num_threads", "compile"):
                raise ValueError(
                    f"actor_rollout_ref.rollout.engine_kwargs.pte.{key}={options[key]!r}: no such option; known "
                    "are num_threads, compile"
                )
    why = "this is an option of vLLM or SGLang that the native engine does not have"
    for key, right in (
        ("quantization", None),
        ("quantization_config_file", None),
        ("max_model_len", None),
        ("disaggregation.enabled", False),
        ("enable_rollout_routing_replay", False),
        ("mtp.enable_rollout", False),
        ("prometheus.enable", False),
        ("logprobs_mode", "processed_logprobs"),
    ):
        _require(rollout, key, right, why, prefix="actor_rollout_ref.rollout.")


def _check_model_files(config: Any, pte: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from verl.utils.fs import copy_to_local
    from verl.utils.model import update_model_config

    from verl_pte.peft import attach

    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    override = _plain(model.get("override_config", None) or {})
    path = copy_to_local(model.get("hf_config_path", None) or model.path, use_shm=model.get("use_shm", False))
    hf_config = AutoConfig.from_pretrained(
        path,
        trust_remote_code=model.get("trust_remote_code", False),
        attn_implementation=override.pop("attn_implementation", "sdpa"),
    )
    update_model_config(hf_config, override_config_kwargs=override.get("model_config", override))
    limit = getattr(hf_config, "max_position_embeddings", None)
    positions = rollout.prompt_length + rollout.response_length
    if limit is not None and positions > limit:
        raise ValueError(
            f"data.max_prompt_length={rollout.prompt_length} + data.max_response_length={rollout.response_length} "
            f"= {positions}: "
            f"exceeds the model's max_position_embeddings={limit}. The window bounds the cache, not the positions; "
            "shorten them to fit, or extend the model's RoPE with model.override_config"
        )
    with torch.device("meta"):  # attach knows which architectures and modules it takes; no weights are needed to ask it
        attach(AutoModelForCausalLM.from_config(hf_config), pte)


def _require(block: Any, key: str, right: Any, why: str, prefix: str = "actor_rollout_ref.") -> None:
    value: Any = block
    for part in key.split("."):
        if value is None or part not in value:
            return
        value = value[part]
    if value != right:
        raise ValueError(f"{prefix}{key}={value!r}: must be {right!r}, {why}")


def _plain(block: Any) -> Any:
    from omegaconf import OmegaConf

    if OmegaConf.is_config(block):
        return OmegaConf.to_container(block, resolve=True)
    return dict(block) if isinstance(block, Mapping) else block
