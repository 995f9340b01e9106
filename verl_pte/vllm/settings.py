"""What the vLLM side of PTE is told: the method, where the adapter is, how long prompts may be.

It travels in vLLM's ``additional_config`` under ``pte``, as plain JSON, because that is what reaches every vLLM
process and its compilation cache key. `engine_args` writes it, `Settings.of` reads it back, `check` refuses vLLM
options under which rollouts would not be exact.
"""

import os
from dataclasses import dataclass
from typing import Any

from verl_pte.config import PTEConfig
from verl_pte.vllm.architectures import ARCHITECTURES
from verl_pte.vllm.version import require_version

# What vLLM's attention kernels, on CPUs and GPUs, demand of a cache block.
BLOCK_MULTIPLE = 16


@dataclass(frozen=True)
class Settings:
    """PTE's part of a vLLM configuration.

    Attributes:
        pte: the method.
        adapter: directory of a saved PEFT adapter, or None: zero until weights are sent.
        max_prompt_length: longest prompt in tokens; it bounds the blocks of a request. None: max_model_len.
    """

    pte: PTEConfig
    adapter: str | None = None
    max_prompt_length: int | None = None

    @classmethod
    def of(cls, vllm_config: Any) -> "Settings":
        """The settings inside a VllmConfig. Raises ValueError if there are none."""
        block = (vllm_config.additional_config or {}).get("pte")
        if block is None:
            raise ValueError(
                "additional_config has no `pte`: a PTE model needs its settings; make vLLM's arguments with "
                "verl_pte.vllm.engine_args(model, pte=... or adapter=...)"
            )
        return cls(PTEConfig(**block["config"]), block["adapter"], block["max_prompt_length"])

    def to_json(self) -> dict[str, Any]:
        """The plain form that `of` reads."""
        config = {name: getattr(self.pte, name) for name, _, _ in PTEConfig.knobs()}
        if isinstance(config["target_modules"], set):
            config["target_modules"] = sorted(config["target_modules"])
        return {"config": config, "adapter": self.adapter, "max_prompt_length": self.max_prompt_length}


def engine_args(
    model: str,
    *,
    pte: PTEConfig | None = None,
    adapter: str | None = None,
    max_prompt_length: int | None = None,
    hf_config: Any = None,
) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM`` or ``vllm.AsyncEngineArgs`` that run `model` under PTE.

    Args:
        model: path or hub id of the base model.
        pte: the method; by default what the adapter was saved with.
        adapter: directory of a saved PTE adapter. None starts as the base model and waits for weights.
        max_prompt_length: see `Settings`.
        hf_config: the base model's transformers config, if it is loaded already.

    Also puts ``VLLM_USE_V2_MODEL_RUNNER=0`` into the environment: the runner PTE extends is the first one.
    Raises RuntimeError for another vLLM version and ValueError for settings that cannot work.
    """
    from transformers import AutoConfig

    from verl_pte.peft.model import check_architecture
    from verl_pte.peft.saved import saved_config

    require_version()
    use_first_model_runner()
    if pte is None:
        if adapter is None:
            raise ValueError("engine_args: give pte=PTEConfig(...), or adapter=DIR to read it from")
        pte = saved_config(adapter)
    if pte.block_size % BLOCK_MULTIPLE:
        raise ValueError(
            f"block_size={pte.block_size}: must be a multiple of {BLOCK_MULTIPLE} with vLLM, whose kernels want such "
            "cache blocks"
        )
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length={max_prompt_length}: must be at least 1, or None")
    hf_config = hf_config or AutoConfig.from_pretrained(model)
    check_architecture(hf_config)
    settings = Settings(pte, None if adapter is None else os.path.abspath(adapter), max_prompt_length)
    return {
        "model": model,
        "hf_overrides": {"architectures": [ARCHITECTURES[hf_config.model_type]]},
        "block_size": pte.block_size,
        "worker_cls": "verl_pte.vllm.worker.PTEWorker",
        "scheduler_cls": "verl_pte.vllm.scheduler.make_scheduler",
        "additional_config": {"pte": settings.to_json()},
    }


def use_first_model_runner() -> None:
    """Select the model runner PTE extends, for this process and those it starts.

    Raises ValueError if the user asked for the other.
    """
    if os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0") != "0":
        raise ValueError(
            f"VLLM_USE_V2_MODEL_RUNNER={os.environ['VLLM_USE_V2_MODEL_RUNNER']}: must be 0 or unset, PTE extends "
            "vLLM's first model runner"
        )


def check(vllm_config: Any) -> None:
    """Raise ValueError for a vLLM option PTE cannot honour, naming it, its value and what would be right."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    settings = Settings.of(vllm_config)

    def require(name: str, value: Any, right: Any, why: str) -> None:
        if value != right:
            raise ValueError(f"{name}={value!r}: must be {right!r} with PTE, {why}")

    require("block_size", cache.block_size, settings.pte.block_size, "the block size of the eviction schedule")
    one = "a sequence's cache and thought state are not split that way"
    require("pipeline_parallel_size", parallel.pipeline_parallel_size, 1, one)
    require("data_parallel_size", parallel.data_parallel_size, 1, "it was not tried; run several servers")
    require("decode_context_parallel_size", parallel.decode_context_parallel_size, 1, one)
    require("prefill_context_parallel_size", parallel.prefill_context_parallel_size, 1, one)
    require("enable_dbo", parallel.enable_dbo, False, "its half-batches would share one set of block tables")
    require(
        "speculative_config", vllm_config.speculative_config, None, "rejected tokens cannot be taken out of a state"
    )
    require("quantization", vllm_config.model_config.quantization, None, "the learner replays with unquantised weights")
    if settings.adapter is not None and vllm_config.load_config.load_format == "dummy":
        raise ValueError("load_format='dummy': must be auto with an adapter, which is loaded with the base's weights")
    require("enable_lora", vllm_config.lora_config is not None, False, "the PTE adapter is the adapter")
    require("kv_transfer_config", vllm_config.kv_transfer_config, None, "thought states do not travel with KV blocks")
    if cache.cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(
            f"kv_cache_dtype={cache.cache_dtype!r}: must be auto, the encoder reads keys as they were written"
        )
    use_v2 = vllm_config.use_v2_model_runner
    require("VLLM_USE_V2_MODEL_RUNNER", bool(use_v2), False, "PTE extends vLLM's first model runner")
    if not vllm_config.scheduler_config.enable_chunked_prefill:
        raise ValueError("enable_chunked_prefill=False: must be True with PTE, a chunk ends where tokens are evicted")
