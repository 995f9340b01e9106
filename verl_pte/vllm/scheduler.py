"""vLLM's schedulers, with steps that end where tokens are evicted.

All tokens of a step see one window and one thought state, so a step may not run past the next eviction. vLLM has a
hook that shortens a request's step (made for Mamba models); it is called right before blocks are allocated, which is
also the moment to give evicted ones back. A request resumed from preemption is recomputed through the same boundaries,
and its state with it.

Left out: block bookkeeping (kv_cache.py). Facts about a finished response, evictions and peak cache, ride to the
client in ``RequestOutput.kv_transfer_params``, the one per-request field a scheduler may fill.
"""

import logging
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from verl_pte.vllm.kv_cache import ThoughtCacheManager
from verl_pte.vllm.settings import Settings, check

_logger = logging.getLogger("vllm.verl_pte")


class PTEScheduler(Scheduler):
    """One step at a time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check(self.vllm_config)
        self.settings = Settings.of(self.vllm_config)
        self.schedule_of_evictions = self.settings.pte.schedule()
        self.need_mamba_block_aligned_split = True
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, ThoughtCacheManager), "the model's attention layers report a ThoughtSpec"
        self.thought_cache = manager
        manager.limit_admission(self.max_model_len)

    def add_request(self, request: Any) -> None:
        """Queue a request; one that cannot be served ends with an error, the others go on."""
        # The hashes of its prompt are there already. Those of its answer could match blocks of a longer prompt (the
        # next turn of a chat) when it comes back from preemption, and those were computed without a thought state.
        request._block_hasher = None
        super().add_request(request)
        limit = self.settings.max_prompt_length
        refused = None
        if limit is not None and request.num_prompt_tokens > limit:
            refused = f"its prompt has {request.num_prompt_tokens} tokens, max_prompt_length is {limit}"
        elif request.resumable:
            refused = "a prompt that grows while it is answered has no fixed eviction schedule"
        if refused is not None:
            _logger.error("request %s ends with an error: %s", request.request_id, refused)
            self.grammar_compile_error_reqs.add(request.request_id)  # vLLM's list of requests to fail at the next step

    def _mamba_block_aligned_split(
        self, request: Any, num_new_tokens: int, num_new_local_computed_tokens: int = 0, *args: Any, **kwargs: Any
    ) -> int:
        prompt_len = request.num_prompt_tokens
        start = request.num_computed_tokens + num_new_local_computed_tokens
        # vLLM frees by what has been processed, which lags behind under async scheduling. Steps run in order on the
        # worker, which reads evicted keys before it writes new ones: to free at the boundary itself is safe, and keeps
        # a request within its bound.
        self.thought_cache.remove_skipped_blocks(request.request_id, start, prompt_len)
        boundary = self.schedule_of_evictions.next_boundary(prompt_len, start)
        return num_new_tokens if boundary is None else min(num_new_tokens, boundary - start)

    def _connector_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        holding = self.thought_cache.holdings.pop(request.request_id, None)
        if holding is None:
            return False, None
        prompt_len = request.num_prompt_tokens
        run = prompt_len + max(request.num_output_tokens - 1, 0)  # the last token has been sampled, not run
        facts = {
            "num_evictions": self.schedule_of_evictions.num_evictions(prompt_len, run),
            "peak_cache_tokens": holding.peak_tokens,
            "peak_cache_blocks": holding.peak_blocks,
            "num_preemptions": request.num_preemptions,
        }
        return False, {"pte": facts}


class PTEAsyncScheduler(PTEScheduler, AsyncScheduler):
    """Schedules a step while the one before it runs."""


def make_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """What ``scheduler_cls`` names: the scheduler that fits vLLM's ``async_scheduling``, which platforms change."""
    kind = PTEAsyncScheduler if vllm_config.scheduler_config.async_scheduling else PTEScheduler
    return kind(vllm_config, *args, **kwargs)
