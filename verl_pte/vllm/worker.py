"""vLLM's workers, with a model runner that keeps thought states up to date.

`PTEWorker` is what ``worker_cls`` names; it is the CPU's or the GPU's worker, whichever the platform has. vLLM has no
way to name a runner class, so the runner a worker has built is given a subclass of its own class: the same object, some
methods of which do a little more.
"""

from typing import Any

import numpy as np
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from verl_pte.vllm.settings import check

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as _Runner
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker

    _Runner = GPUModelRunner


class PTEModelRunner(_Runner):
    """vLLM's first model runner, on CPUs and GPUs."""

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's, then a look at its block tables, which have to count in the schedule's blocks."""
        super().initialize_kv_cache(*args, **kwargs)
        if self.input_batch.block_table[0].use_hybrid_blocks:
            raise ValueError(
                f"block_size={self.cache_config.block_size}: the attention backend splits such blocks for its kernels; "
                "set model.pte.block_size to a size it has, e.g. 16"
            )

    def _update_states(self, scheduler_output: Any) -> Any:
        thoughts = self.get_model().thoughts
        # Before this step's requests are looked at: one may have been preempted and resumed in between.
        thoughts.release(scheduler_output.finished_req_ids)
        thoughts.release(scheduler_output.preempted_req_ids or ())
        return super()._update_states(scheduler_output)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        """vLLM's preparation, after which the block tables are current; then the states, before anything is written."""
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        size = batch.num_reqs
        self.get_model().thoughts.prepare(
            batch.req_ids,
            batch.num_prompt_tokens[:size].tolist(),
            batch.num_computed_tokens_cpu[:size].tolist(),
            num_scheduled_tokens,
            batch.block_table[0].get_numpy_array(),
        )
        return prepared

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; on a CPU without the random streams of requests that are still being prefilled.

        vLLM draws a token for those, drops it and winds their streams back, which CPU generators cannot: a request
        with a seed that is prefilled in several steps, as one resumed from preemption is, would end the engine.
        """
        if self.device.type != "cpu":
            return super().sample_tokens(*args, **kwargs)
        streams = self.input_batch.generators
        unfinished = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist()
        aside = {row: streams.pop(row) for row in unfinished if row in streams}
        try:
            return super().sample_tokens(*args, **kwargs)
        finally:
            streams.update(aside)

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        self.get_model().thoughts.idle()
        return super()._dummy_run(*args, **kwargs)


class PTEWorker(_Worker):
    """The platform's worker with a PTEModelRunner."""

    def init_device(self) -> None:
        """vLLM's, then the runner becomes ours."""
        check(self.vllm_config)
        super().init_device()
        assert type(self.model_runner) is _Runner, "settings.check asks for vLLM's first model runner"
        self.model_runner.__class__ = PTEModelRunner
