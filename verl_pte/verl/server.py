"""RolloutServer: the Ray actor that owns a native rollout engine and answers verl's requests.

verl talks tokens to it: prompt ids and a sampling dict in, TokenOutput out, with log-probs and, in `extra_fields`,
the weights' step (verl's metrics need it as an int) and the response's evictions and peak cache tokens. Sleeping
frees the cache; the weights stay, since only the adapter's are sent after the first hand-over. Left out: the OpenAI
HTTP interface (serving is the vLLM engine's) and profiling.
"""

import itertools
import logging
import os
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM
from verl.plugin.platform import get_platform
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.rollout.replica import TokenOutput

from verl_pte.engine import AsyncRolloutEngine, RolloutEngine
from verl_pte.peft import attach
from verl_pte.verl.sampling import derive_seed, sampling_params
from verl_pte.verl.weight_transfer import Bucket, unpack

_logger = logging.getLogger(__name__)


class RolloutServer:
    """One replica's engine."""

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        self.config = omega_conf_to_dataclass(config)
        model_config = omega_conf_to_dataclass(model_config)
        options = (self.config.engine_kwargs or {}).get("pte", None) or {}
        device = _device()
        if device == "cpu":
            torch.set_num_threads(options.get("num_threads", 1))
        self.replica_rank, self.global_steps = replica_rank, 0
        self.stop_token_ids = _stop_token_ids(model_config)
        self.requests = itertools.count()
        dtype = PrecisionType.to_dtype(self.config.dtype)
        engine = RolloutEngine(
            _build_model(model_config, dtype, device, self.config.load_format),
            max_num_seqs=self.config.max_num_seqs,
            max_prompt_length=self.config.prompt_length,
            max_response_length=self.config.response_length,
            dtype=dtype,
            device=device,
            compile=options.get("compile", False),
            cuda_graph=not self.config.enforce_eager,
        )
        self.engine = AsyncRolloutEngine(engine)
        self.accepting = True

    async def ready(self) -> None:
        """Returns once the engine is built."""

    async def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        image_data: Any = None,
        video_data: Any = None,
        audio_data: Any = None,
        **_: Any,
    ) -> TokenOutput:
        """One response.

        Raises ValueError for what the engine cannot serve. If the engine has died, so does this actor: verl counts
        a request that raises as one lost prompt and would go on asking.
        """
        if image_data or video_data or audio_data:
            raise ValueError("the native PTE engine serves text only")
        if not self.accepting:
            raise RuntimeError(f"replica {self.replica_rank} rejects requests until resume_generation()")
        sampling = self._sampling(sampling_params)
        try:
            output = await self.engine.generate(request_id, prompt_ids, sampling)
        except Exception:
            self._exit_if_the_engine_died()
            raise
        return TokenOutput(
            token_ids=output.token_ids,
            log_probs=output.log_probs if sampling_params.get("logprobs", True) else None,
            stop_reason="aborted" if output.finish_reason == "abort" else "completed",
            extra_fields={
                "global_steps": self.global_steps,
                "num_evictions": output.num_evictions,
                "peak_cache_tokens": output.peak_cache_tokens,
            },
        )

    # -- weights
    # ----------------------------------------------------------------------------------------------------------

    async def load_weights(self, bucket: Bucket) -> int:
        """Copy a bucket into the model by name; returns how many tensors."""
        return await self.engine.load_weights(list(unpack(bucket)))

    async def set_global_steps(self, global_steps: int) -> None:
        """The step the weights belong to, reported with every response from now on."""
        self.global_steps = int(global_steps)

    # -- memory and admission
    # ---------------------------------------------------------------------------------------------

    async def sleep(self, **_: Any) -> None:
        """Free the cache until `wake_up`; requests that arrive meanwhile wait.

        Nothing to do if verl asked to keep the cache. Raises RuntimeError while sequences run.
        """
        if self.config.free_cache_engine:
            await self.engine.sleep()

    async def wake_up(self, tags: list[str] | None = None, **_: Any) -> None:
        """Allocate the cache again. Weights, which verl wakes first, never left."""
        if tags is None or "kv_cache" in tags:
            await self.engine.wake()

    async def release_kv_cache(self) -> None:
        """As `sleep`, whatever free_cache_engine says."""
        await self.engine.sleep()

    async def resume_kv_cache(self) -> None:
        """As `wake_up`."""
        await self.engine.wake()

    async def clear_kv_cache(self) -> None:
        """Nothing to clear: no keys or values outlive their request, so new weights meet no old cache."""

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """Stop every request, whose callers get what was generated; hold or reject new ones until
        `resume_generation`.
        """
        self.accepting = not reject_request
        await self.engine.pause()
        await self.engine.abort(None)
        return {}

    async def resume_generation(self) -> None:
        """Serve requests again after `abort_all_requests`."""
        self.accepting = True
        await self.engine.resume()

    async def start_profile(self, **_: Any) -> None:
        """Not profiled."""

    async def stop_profile(self, **_: Any) -> None:
        """Not profiled."""

    def _exit_if_the_engine_died(self) -> None:
        failure = self.engine.failure
        if failure is not None:
            _logger.critical(
                "replica %d: the rollout engine died, ending the server", self.replica_rank, exc_info=failure
            )
            ray.actor.exit_actor()

    def _sampling(self, wanted: dict[str, Any]) -> Any:
        # Requests of our agent loop bring their seed; others get one that no other replica or request has.
        own_seed = derive_seed(self.config.seed, self.replica_rank, self.global_steps, next(self.requests))
        return sampling_params(
            wanted,
            max_response_length=self.config.response_length,
            seed=own_seed,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.config.ignore_eos,
        )


def _device() -> str:
    platform = get_platform()
    if not platform.is_available():
        raise RuntimeError(
            f"the rollout server was given no {platform.device_name} device, which is verl's platform here "
            f"({platform.visible_devices_envvar()}={os.environ.get(platform.visible_devices_envvar())!r}); set "
            "VERL_PLATFORM=cpu, in all processes, to run without one"
        )
    return platform.device_name


def _build_model(model_config: Any, dtype: torch.dtype, device: str, load_format: str) -> Any:
    if load_format == "dummy":  # the trainer sends the base weights, once
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(model_config.hf_config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            model_config.local_path,
            config=model_config.hf_config,
            dtype=dtype,
            trust_remote_code=model_config.trust_remote_code,
        )
    return attach(model, model_config.pte)


def _stop_token_ids(model_config: Any) -> tuple[int, ...]:
    """End-of-sequence tokens of the model's generation config and of its tokenizer."""
    ids: set[int] = set()
    for source in (model_config.generation_config, model_config.tokenizer):
        found = getattr(source, "eos_token_id", None)
        ids |= set(found) if isinstance(found, (list, tuple)) else set() if found is None else {found}
    return tuple(sorted(ids))
