"""Checks of the rollout block for ``rollout.name: pte_vllm``, before anything starts.

What vLLM checks by itself is left to it. Here are settings that would make rollouts differ from the learner's replay,
and those that verl_pte.vllm.engine_args sets and a user therefore cannot.
"""

from typing import Any

from verl_pte.verl.components import ROLLOUT, VLLM_ROLLOUT
from verl_pte.verl.requirement import plain, require

_PREFIX = "actor_rollout_ref.rollout."
_SET_BY_US = {  # in engine_kwargs.vllm, which verl puts over everything else
    "additional_config": "it carries PTE's own settings",
    "async_scheduling": "vLLM chooses it by platform",
    "block_size": "it is model.pte.block_size",
    "data_parallel_size": "each replica is one vLLM engine",
    "dtype": "it is rollout.dtype",
    "enable_chunked_prefill": "a chunk of a sequence ends where tokens are evicted",
    "enable_lora": "the PTE adapter is the adapter",
    "hf_overrides": "it names the PTE model class",
    "kv_cache_dtype": "the thought encoder reads unquantised keys",
    "kv_transfer_config": "thought states do not travel with KV blocks",
    "load_format": "it is rollout.load_format",
    "logprobs_mode": "the learner's log-probs are those after temperature",
    "pipeline_parallel_size": "a sequence's cache and thought state are not split that way",
    "quantization": "the learner replays with unquantised weights",
    "scheduler_cls": "it is PTE's",
    "speculative_config": "rejected tokens cannot be taken out of a thought state",
    "tensor_parallel_size": "it is rollout.tensor_model_parallel_size",
    "worker_cls": "it is PTE's",
    "worker_extension_cls": "it is PTE's",
}


def check_vllm_rollout(config: Any, pte: Any) -> None:
    """Raise ValueError (RuntimeError for vLLM's version) if `rollout` cannot work with PTE on vLLM."""
    from verl_pte.vllm.settings import BLOCK_MULTIPLE, use_first_model_runner
    from verl_pte.vllm.version import require_version

    rollout = config.actor_rollout_ref.rollout
    require_version()
    use_first_model_runner()
    if pte.block_size % BLOCK_MULTIPLE:
        raise ValueError(
            f"model.pte.block_size={pte.block_size}: must be a multiple of {BLOCK_MULTIPLE} with "
            f"rollout.name={VLLM_ROLLOUT}, vLLM's kernels want such cache blocks"
        )
    why = "a replica is one vLLM engine, which PTE splits by tensor_model_parallel_size alone"
    for key in ("pipeline_model_parallel_size", "data_parallel_size", "expert_parallel_size"):
        require(rollout, key, 1, why, prefix=_PREFIX)
    naive = "the training workers hand their weights to the server beside them"
    require(rollout, "checkpoint_engine.backend", "naive", naive, prefix=_PREFIX)
    seeds = "every response has a seed of its own already, and verl would give all requests one"
    require(rollout, "full_determinism", False, seeds, prefix=_PREFIX)
    for key, right, why in (
        ("enable_chunked_prefill", True, "a chunk of a sequence ends where tokens are evicted"),
        ("logprobs_mode", "processed_logprobs", "the learner's log-probs are those after temperature"),
        ("quantization", None, "the learner replays with unquantised weights"),
        ("quantization_config_file", None, "the learner replays with unquantised weights"),
        ("enable_rollout_routing_replay", False, "PTE's architectures have no experts"),
        ("layered_summon", False, "adapter tensors are gathered one by one anyway"),
        ("disaggregation.enabled", False, "thought states do not travel with KV blocks"),
        ("mtp.enable_rollout", False, "rejected tokens cannot be taken out of a thought state"),
        ("scheduling_policy", "fcfs", "verl sends priorities to rollout vllm only"),
        ("repetition_penalty", 1.0, "the learner's log-probs know no penalty"),
    ):
        require(rollout, key, right, why, prefix=_PREFIX)
    why = "vLLM reads the config beside the weights; what differs goes into model.override_config"
    require(config.actor_rollout_ref, "model.hf_config_path", None, why)
    if rollout.get("load_format", "auto") not in ("auto", "dummy"):
        raise ValueError(
            f"{_PREFIX}load_format={rollout.load_format}: must be auto (the server reads the base model itself) or "
            "dummy (it is sent the base, once)"
        )
    _check_engine_kwargs(plain(rollout.get("engine_kwargs", None) or {}))
    if config.trainer.device == "cpu":
        _check_cpu(rollout)


def _check_engine_kwargs(engine_kwargs: dict[str, Any]) -> None:
    if engine_kwargs.get(ROLLOUT):
        raise ValueError(
            f"{_PREFIX}engine_kwargs.{ROLLOUT}={engine_kwargs[ROLLOUT]}: must be empty, those are the native engine's; "
            "vLLM's own are in engine_kwargs.vllm"
        )
    for key, value in (engine_kwargs.get("vllm") or {}).items():
        if key in _SET_BY_US and value is not None:
            raise ValueError(f"{_PREFIX}engine_kwargs.vllm.{key}={value!r}: must not be set, {_SET_BY_US[key]}")


def _check_cpu(rollout: Any) -> None:
    why = "vLLM cannot put its cache to sleep on a CPU"
    require(rollout, "enable_sleep_mode", False, why, prefix=_PREFIX)
    require(rollout, "free_cache_engine", False, why, prefix=_PREFIX)
    why = "vLLM on a CPU repacks the base weights it has read and cannot take others later"
    require(rollout, "load_format", "auto", why, prefix=_PREFIX)
