"""VLLMServer: verl's vLLM server, whose engine runs PTE.

verl's own server does the work: it launches vLLM with an OpenAI endpoint, generates, pauses, sleeps. Here it is told
which vLLM classes to use (verl_pte.vllm.engine_args), how long prompts can be, and to report evictions and peak cache
with each response. Left out: what the trainer sends and how (vllm_server_adapter.py), the worker's end of it
(vllm_worker.py).
"""

import logging
from typing import Any

import ray
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.v1.engine.exceptions import EngineDeadError

from verl_pte.verl.components import VLLM_ROLLOUT
from verl_pte.vllm import engine_args

_logger = logging.getLogger(__name__)


class VLLMServer(vLLMHttpServer):
    """One replica's vLLM engine, on one node."""

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **more: Any
    ) -> TokenOutput:
        """One response, with `num_evictions` and `peak_cache_tokens` in `extra_fields`.

        Raises ValueError for a prompt longer than the configuration says. If the engine has died, so does this actor:
        verl counts a request that raises as one lost prompt and would go on asking.
        """
        limit = self.config.prompt_length
        if len(prompt_ids) > limit:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens: must have at most {limit}, data.max_prompt_length")
        try:
            output = await super().generate(prompt_ids, sampling_params, request_id, **more)
        except EngineDeadError as died:
            _logger.critical("replica %d: vLLM's engine died, ending the server", self.replica_rank, exc_info=died)
            ray.actor.exit_actor()
        if output.stop_reason == "error":
            raise RuntimeError(f"replica {self.replica_rank}: vLLM failed request {request_id}; its log says why")
        facts = (output.extra_fields.pop("kv_transfer_params", None) or {}).get("pte")
        if facts is not None:
            output.extra_fields |= {key: facts[key] for key in ("num_evictions", "peak_cache_tokens")}
            output.num_preempted = facts["num_preemptions"]
        return output

    # -- hooks of verl's server
    # -----------------------------------------------------------------------------------------

    def _init_model_config(self, model_config: Any) -> Any:
        config = omega_conf_to_dataclass(model_config)
        config.lora = {**config.lora, "merge": True}  # to verl: no LoRA of vLLM's own
        return config

    def _validate_configs(self) -> None:
        if self.config.max_model_len is None:
            self.config.max_model_len = self.config.prompt_length + self.config.response_length
        super()._validate_configs()

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        ours = engine_args(
            self.model_config.local_path,
            pte=self.model_config.pte,
            max_prompt_length=self.config.prompt_length,
            hf_config=self.model_config.hf_config,
        )
        del ours["model"]
        override = {k: v for k, v in self.model_config.override_config.items() if k != "attn_implementation"}
        ours["hf_overrides"] = {**override.get("model_config", override), **ours["hf_overrides"]}
        engine_kwargs.update(ours)

    def _get_worker_extension_cls(self) -> str:
        return "verl_pte.verl.vllm_worker.PTEWorkerExtension"

    def _resolve_sleep_level(self) -> int:
        return 1  # the base is not sent again: it has to survive sleep


class VLLMReplica(vLLMReplica):
    """verl's vLLM replica with our server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(VLLMServer)

    def _get_server_name_prefix(self) -> str:
        return f"{VLLM_ROLLOUT}_"
