"""One response at a time, token by token, on vLLM: for a chat. The counterpart of verl_pte/engine/stream.py.

vLLM runs inside this process (no engine or worker process), so a Ctrl-C reaches nothing but the chat, which stops
between two steps. Its KV cache is what one sequence needs: pinned + window. The scheduler reports a request's peak at
its end; while it runs, what it holds follows from the schedule.

Left out: several GPUs and several requests; `verl-pte serve` has them.
"""

import os
from argparse import Namespace
from collections.abc import Generator
from typing import Any

from verl_pte.core.schedule import Schedule
from verl_pte.engine.sampling import SamplingParams
from verl_pte.engine.stream import Piece, fitted
from verl_pte.vllm.sampling import vllm_sampling
from verl_pte.vllm.settings import Settings


class VLLMStreamer:
    """Streams from an in-process vLLM engine.

    Args:
        args: vLLM's arguments, from options.py; one sequence at a time, whatever they say.
        max_prompt_length: longest prompt in tokens; with the window it sizes the cache.
    """

    def __init__(self, args: Namespace, max_prompt_length: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        from verl_pte.vllm.options import checked_config

        args.max_num_seqs = 1
        context = UsageContext.LLM_CLASS
        vllm_config = checked_config(EngineArgs.from_cli_args(args), context)
        if vllm_config.parallel_config.world_size_across_dp != 1:
            raise ValueError("tensor_parallel_size, data_parallel_size: must be 1 here; verl-pte serve runs on several")
        self.schedule = Settings.of(vllm_config).pte.schedule()
        self.max_prompt_length, self.max_positions = max_prompt_length, vllm_config.model_config.max_model_len
        if vllm_config.cache_config.kv_cache_memory_bytes is None:
            tokens = _most_tokens(self.schedule, min(max_prompt_length, self.max_positions), self.max_positions)
            vllm_config.cache_config.kv_cache_memory_bytes = tokens * _bytes_per_token(vllm_config)
        self.engine = LLMEngine.from_vllm_config(vllm_config, context, disable_log_stats=True)
        self._num_requests = 0

    def stream(self, prompt: list[int], sampling: SamplingParams) -> Generator[Piece, None, None]:
        """See `Streamer`."""
        from vllm.inputs.engine import tokens_input

        sampling = fitted(sampling, len(prompt), self.max_prompt_length, self.max_positions)
        self._num_requests += 1
        request_id = self.engine.add_request(
            str(self._num_requests), tokens_input(prompt), vllm_sampling(sampling, "DELTA")
        )
        count = 0
        try:
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    (completion,) = output.outputs
                    count += len(completion.token_ids)
                    yield self._piece(len(prompt), list(completion.token_ids), count, output)
        finally:
            self.engine.abort_request([request_id], internal=True)

    def _piece(self, prompt_len: int, token_ids: list[int], count: int, output: Any) -> Piece:
        run = prompt_len + max(count - 1, 0)  # the last token has been sampled, not run
        held = run - self.schedule.evicted_before(prompt_len, run - 1)
        piece = Piece(
            token_ids, held, self.schedule.cache_limit(prompt_len), self.schedule.num_evictions(prompt_len, run)
        )
        if not output.finished:
            return piece
        facts = (output.kv_transfer_params or {}).get("pte", {})
        return piece._replace(
            finish_reason=output.outputs[0].finish_reason, peak_cache_tokens=facts.get("peak_cache_tokens")
        )


def _most_tokens(schedule: Schedule, longest_prompt: int, max_positions: int) -> int:
    """Tokens of cache blocks one sequence may need, and vLLM's null block."""
    full, limit = schedule.pinned(max_positions), schedule.cache_limit(longest_prompt)
    return (full if limit is None else min(full, limit)) + schedule.block_size


def _bytes_per_token(vllm_config: Any) -> int:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    per_layer = 2 * model.get_num_kv_heads(parallel) * model.get_head_size() * model.dtype.itemsize
    return model.get_num_layers(parallel) * per_layer
