"""Many responses at once, to their ends, on vLLM: for an evaluation. It has the methods of `RolloutEngine` that takes.

vLLM's engine runs inside this process, so that it ends with it, however that ends; tensor-parallel workers are
processes of their own. Left out: log-probabilities, and tokens before a response is whole (stream.py).
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from verl_pte.engine.request import RolloutOutput
from verl_pte.engine.sampling import SamplingParams
from verl_pte.vllm.sampling import vllm_sampling
from verl_pte.vllm.settings import Settings


class VLLMBatch:
    """Continuous batching on an in-process vLLM engine.

    Args:
        args: vLLM's arguments, from options.py.

    Attributes:
        schedule: when what is evicted.
        max_num_seqs: sequences that may run at once.
    """

    def __init__(self, args: Namespace) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        from verl_pte.vllm.options import checked_config

        context = UsageContext.LLM_CLASS
        vllm_config = checked_config(EngineArgs.from_cli_args(args), context)
        self.schedule = Settings.of(vllm_config).pte.schedule()
        self.max_num_seqs: int = vllm_config.scheduler_config.max_num_seqs
        self.engine = LLMEngine.from_vllm_config(vllm_config, context, disable_log_stats=True)
        self._requests: dict[str, Any] = {}  # vLLM's id -> ours
        self._count = 0

    def add_request(self, request_id: Any, prompt: Sequence[int], sampling: SamplingParams) -> None:
        """Queue one prompt."""
        from vllm.inputs.engine import tokens_input

        self._count += 1
        self._requests[str(self._count)] = request_id
        self.engine.add_request(str(self._count), tokens_input(list(prompt)), vllm_sampling(sampling, "FINAL_ONLY"))

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return self.engine.has_unfinished_requests()

    def step(self) -> list[RolloutOutput]:
        """One step of vLLM; returns what finished, without log-probabilities.

        Raises RuntimeError for a response that vLLM ended early.
        """
        finished = []
        for output in self.engine.step():
            (completion,) = output.outputs
            facts = (output.kv_transfer_params or {}).get("pte")
            if completion.finish_reason not in ("stop", "length") or facts is None:
                raise RuntimeError(f"vLLM ended a response with finish reason {completion.finish_reason!r}")
            finished.append(
                RolloutOutput(
                    request_id=self._requests.pop(output.request_id),
                    prompt_index=0,
                    token_ids=list(completion.token_ids),
                    log_probs=[],
                    finish_reason=completion.finish_reason,
                    num_evictions=facts["num_evictions"],
                    peak_cache_tokens=facts["peak_cache_tokens"],
                )
            )
        return finished

    def close(self) -> None:
        """End vLLM's engine, and free its memory."""
        self._requests.clear()
        self.engine.engine_core.shutdown()
        del self.engine
