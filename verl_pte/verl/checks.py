"""Checks of a whole run's configuration, before anything starts.

Every message names the key, its value and what would be right. Settings of the ``model`` block alone are checked with
it (config.py); here are those between blocks, and what only the model's own config file can tell.
"""

import importlib.util
from typing import Any

from verl_pte.verl.components import AGENT_LOOP, MODEL_TARGET, ROLLOUT, ROLLOUTS, VLLM_ROLLOUT, is_pte_model
from verl_pte.verl.config import check_model_settings, parse_pte_block, require_plugin
from verl_pte.verl.megatron_checks import check_megatron, check_megatron_model
from verl_pte.verl.requirement import plain, require
from verl_pte.verl.vllm_checks import check_vllm_rollout

# Options of verl's rollout block that only vLLM, SGLang or TensorRT-LLM read: with the native engine they have to keep
# verl's defaults, so that nobody believes they do something.
_OPTIONS_OF_OTHER_ENGINES = (
    "cudagraph_capture_sizes",
    "disable_log_stats",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enable_rollout_routing_replay",
    "enable_sleep_mode",
    "gpu_memory_utilization",
    "layer_name_map",
    "layered_summon",
    "limit_images",
    "logprobs_mode",
    "max_model_len",
    "max_num_batched_tokens",
    "moe_load_balance_metrics_interval",
    "multi_stage_wake_up",
    "over_sample_rate",
    "quantization",
    "quantization_config_file",
    "repetition_penalty",
    "scheduling_policy",
    "sglang_engine_mode",
    "skip_tokenizer_init",
    "standalone_gpu_memory_utilization",
)


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
            f"actor_rollout_ref.rollout.name={rollout.name}: cannot serve a PTE model, whose cache and thought state "
            f"it does not know; must be {ROLLOUT} (the native engine) or {VLLM_ROLLOUT}"
        )
    pte = parse_pte_block(plain(model.get("pte", {})))
    check_model_settings(model, pte)
    _check_trainer(config)
    _check_lengths(rollout)
    if rollout.name == VLLM_ROLLOUT:
        check_vllm_rollout(config, pte)
    else:
        _check_native_rollout(rollout)
    _check_model_files(config, pte)


def _check_trainer(config: Any) -> None:
    from verl.trainer.ppo.utils import need_critic

    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    why = (
        "the legacy trainer does not tell the agent loop which of a prompt's responses it generates, and all n of them "
        "would be sampled with one seed"
    )
    require(config, "trainer.use_v1", True, why, prefix="")
    _check_strategy(config)
    _check_attention(config)
    if need_critic(config) and not _flash_attn_is_installed():
        raise ValueError(
            f"algorithm.adv_estimator={config.algorithm.adv_estimator}, critic.enable={config.critic.enable}: needs "
            "the package flash-attn, with which verl loads every critic; install it, or use grpo, which has none"
        )
    for key in ("actor.ulysses_sequence_parallel_size", "actor.fsdp_config.ulysses_sequence_parallel_size"):
        require(
            config.actor_rollout_ref, key, 1, "the replay runs a sequence's segments one after the other on one rank"
        )
    why = "under FSDP2's own offloading parameters are never where the replay computes; use param_offload instead"
    require(config.actor_rollout_ref, "actor.fsdp_config.offload_policy", False, why)
    why = "the replay's adapted linears bypass quantization-aware training"
    require(config.actor_rollout_ref, "actor.fsdp_config.qat.enable", False, why)
    require(config.actor_rollout_ref, "actor.qat.enable", False, why)
    require(config.actor_rollout_ref, "actor.use_prefix_grouper", False, "it needs packed sequences")
    require(
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
    require(config.actor_rollout_ref, "rollout.multi_turn.enable", False, why)
    loop = rollout.agent.get("default_agent_loop", AGENT_LOOP)
    if loop not in (AGENT_LOOP, "single_turn_agent"):
        raise ValueError(f"actor_rollout_ref.rollout.agent.default_agent_loop={loop}: must be {AGENT_LOOP}; {why}")


def _flash_attn_is_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _check_strategy(config: Any) -> None:
    from verl.utils.torch_dtypes import PrecisionType

    actor = config.actor_rollout_ref.actor
    if actor.strategy not in ("fsdp", "fsdp2", "megatron"):
        raise ValueError(
            f"actor_rollout_ref.actor.strategy={actor.strategy}: must be fsdp2 (or fsdp on GPUs), or megatron, the "
            "training engines PTE has"
        )
    if actor.strategy == "megatron":
        check_megatron(config)
        return
    if actor.strategy == "fsdp" and config.trainer.device == "cpu":
        raise ValueError(
            "actor_rollout_ref.actor.strategy=fsdp: must be fsdp2 with trainer.device=cpu, FSDP1 needs GPUs"
        )
    dtype = actor.fsdp_config.get("model_dtype", None)
    if dtype is not None and not PrecisionType.is_fp32(dtype):
        raise ValueError(
            f"actor_rollout_ref.actor.fsdp_config.model_dtype={dtype}: must be fp32, the precision of the adapter and "
            "of Adam, whose steps at such learning rates would otherwise round to nothing. What halves the memory of "
            "computation is fsdp_config.mixed_precision (its param_dtype is bf16 by verl's default)"
        )


def _check_lengths(rollout: Any) -> None:
    for name, value in (
        ("data.max_prompt_length", rollout.prompt_length),
        ("data.max_response_length", rollout.response_length),
        ("actor_rollout_ref.rollout.max_num_seqs", rollout.max_num_seqs),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be an integer of at least 1")


def _check_native_rollout(rollout: Any) -> None:
    from verl.workers.config import RolloutConfig

    prefix = "actor_rollout_ref.rollout."
    why = "the native engine is data parallel: one replica on each device"
    for key in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "data_parallel_size",
        "expert_parallel_size",
        "moe_tensor_parallel_size",
    ):
        require(rollout, key, 1, why, prefix=prefix)
    why = "the training workers hand their weights to the server beside them"
    require(rollout, "checkpoint_engine.backend", "naive", why, prefix=prefix)
    why = "every response has a seed of its own already, and verl would give all requests one id"
    require(rollout, "full_determinism", False, why, prefix=prefix)
    if rollout.get("load_format", "auto") not in ("auto", "dummy"):
        raise ValueError(
            f"{prefix}load_format={rollout.load_format}: must be auto (the server reads the base model itself) or "
            "dummy (it is sent the base, once)"
        )
    for engine, options in (rollout.get("engine_kwargs", None) or {}).items():
        if engine != ROLLOUT and options:
            raise ValueError(
                f"actor_rollout_ref.rollout.engine_kwargs.{engine}={plain(options)}: must be empty, the native engine "
                f"has no {engine} options; its own are in engine_kwargs.pte (num_threads, compile)"
            )
        for key in () if engine != ROLLOUT else options or ():
            if key not in ("num_threads", "compile"):
                raise ValueError(
                    f"actor_rollout_ref.rollout.engine_kwargs.pte.{key}={options[key]!r}: no such option; known "
                    "are num_threads, compile"
                )
    why = "this is an option of other engines that the native one does not have (max_num_seqs sets its memory)"
    for key in ("disaggregation.enabled", "mtp.enable_rollout", "prometheus.enable"):
        require(rollout, key, False, why, prefix=prefix)
    require(rollout, "server", None, why, prefix=prefix)
    defaults = RolloutConfig(name=ROLLOUT)
    for key in _OPTIONS_OF_OTHER_ENGINES:
        require(rollout, key, getattr(defaults, key), why, prefix=prefix)


def _check_attention(config: Any) -> None:
    from verl.utils.torch_dtypes import PrecisionType

    from verl_pte.core.attention import NEEDS_GPU

    parts = config.actor_rollout_ref
    attention = (parts.model.get("override_config", None) or {}).get("attn_implementation", "sdpa")
    if attention not in NEEDS_GPU or parts.actor.strategy == "megatron":  # which has no other than sdpa
        return
    key = f"actor_rollout_ref.model.override_config.attn_implementation={attention}"
    if config.trainer.device == "cpu":
        raise ValueError(f"{key}: must be sdpa or eager with trainer.device=cpu, its gradients need GPUs")
    if attention == "flash_attention_2":
        mixed = parts.actor.fsdp_config.get("mixed_precision", None) or {}
        precisions = {
            "rollout.dtype": parts.rollout.get("dtype", "bfloat16"),
            "actor.fsdp_config.mixed_precision.param_dtype": mixed.get("param_dtype", "bf16"),
        }
        for name, dtype in precisions.items():
            if PrecisionType.is_fp32(dtype):
                raise ValueError(f"{key}: flash-attn computes in half precision, but actor_rollout_ref.{name}={dtype}")
        options = (parts.rollout.get("engine_kwargs", None) or {}).get(ROLLOUT, None) or {}
        if parts.rollout.name == ROLLOUT and options.get("compile", False):
            raise ValueError(f"{key}: torch.compile cannot follow it, leave out rollout.engine_kwargs.pte.compile")


def _check_model_files(config: Any, pte: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from verl.utils.fs import copy_to_local
    from verl.utils.model import update_model_config

    from verl_pte.peft import attach
    from verl_pte.verl.start_checks import check_start

    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    override = plain(model.get("override_config", None) or {})
    path = copy_to_local(model.get("hf_config_path", None) or model.path, use_shm=model.get("use_shm", False))
    hf_config = AutoConfig.from_pretrained(
        path,
        trust_remote_code=model.get("trust_remote_code", False),
        attn_implementation=override.pop("attn_implementation", "sdpa"),
    )
    update_model_config(hf_config, override_config_kwargs=override.get("model_config", override))
    if config.actor_rollout_ref.actor.strategy == "megatron":
        check_megatron_model(config, hf_config)
    limit = getattr(hf_config, "max_position_embeddings", None)
    positions = rollout.prompt_length + rollout.response_length
    if limit is not None and positions > limit:
        raise ValueError(
            f"data.max_prompt_length={rollout.prompt_length} + data.max_response_length={rollout.response_length} "
            f"= {positions}: exceeds the model's max_position_embeddings={limit}. The window bounds the cache, not the "
            "positions; shorten them to fit"
        )
    with torch.device("meta"):  # attach knows which architectures and modules it takes; no weights are needed to ask it
        attached = attach(AutoModelForCausalLM.from_config(hf_config), pte)
    check_start(config, attached)
