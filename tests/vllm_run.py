"""For the tests of the vLLM engine: random models on disk, and vLLM runs in a process of their own.

vLLM changes the process it runs in (threads, accelerator hooks, distributed groups), so tests do not import it: they
describe runs, which this file carries out when it is started as a script, and compare what comes back.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peft import PeftModel
from tiny import random_tokens, tiny_model, tiny_pte

SHAPE = dict(
    hidden_size=128,  # vLLM's Qwen2 has heads of hidden_size / num_attention_heads
    head_dim=32,  # the smallest vLLM's CPU attention has
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=1024,
)
# Lengths of 16 prompts: one token, on and off a block, longer than a window of 32.
PROMPT_LENGTHS = (1, 3, 5, 16, 19, 31, 32, 33, 37, 40, 2, 7, 48, 11, 16, 29)
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


@dataclass
class Run:
    """One vLLM engine and what it is asked."""

    model: str
    adapter: str
    prompts: list[list[int]]
    max_tokens: list[int]
    sampling: dict = field(default_factory=lambda: {"temperature": 0.0})
    blocks: int | None = None  # usable blocks of the pool
    max_prompt_length: int | None = 64
    max_num_seqs: int = 6
    max_model_len: int = 512
    max_num_batched_tokens: int = 64
    async_scheduling: bool = False
    compile: bool = False
    prefix_caching: bool = False
    subprocess: bool = False
    tensor_parallel_size: int = 1
    abort: list[int] = field(default_factory=list)  # requests aborted half-way
    preempt_at: list[int] = field(default_factory=list)  # steps after which everything running is preempted
    reset_at: list[int] = field(default_factory=list)  # the same, and the prefix cache is emptied
    arrive_at: list[int] = field(default_factory=list)  # step after which each request is added; by default all at once
    priorities: list[int] = field(default_factory=list)  # of each request, 0 comes first; by default first come first
    kv_cache_bytes: int = 1 << 26
    weights: str | None = None  # safetensors file sent before the requests, after one of its own


def write_model(folder: Path, arch: str, window: int | None, kv_heads: int = 2, **knobs) -> tuple[PeftModel, str, str]:
    """A random model with a random adapter: in memory, and the paths of its base and adapter."""
    base = tiny_model(arch, **(SHAPE | {"num_key_value_heads": kv_heads}))
    base_path = folder / f"{arch}-{kv_heads}"
    base.save_pretrained(base_path)
    model = tiny_pte(arch, window, model=base, **({"block_size": 16} | knobs))
    adapter_path = folder / f"{arch}-{kv_heads}-{window}-{abs(hash(str(knobs)))}"
    model.save_pretrained(adapter_path, save_embedding_layers=False)
    return model, str(base_path), str(adapter_path)


def prompts(seed: int = 0) -> list[list[int]]:
    """Sixteen prompts of mixed lengths."""
    return random_tokens(*PROMPT_LENGTHS, seed=seed)


def carry_out(runs: list[Run], folder: Path, timeout: float = 600) -> list[dict]:
    """Each run's result, in one process for all: per request token_ids, log_probs, finish_reason, facts."""
    spec, result = folder / "runs.json", folder / "results.json"
    spec.write_text(json.dumps([asdict(run) for run in runs]))
    multiprocess = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if runs[0].subprocess else "0"}
    done = subprocess.run(
        [sys.executable, __file__, str(spec), str(result)],
        env=os.environ | ENVIRONMENT | multiprocess | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(result.read_text())


# -- in the process of its own
# ----------------------------------------------------------------------------------------------


def engine(run: Run):
    """A vLLM engine for a run."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    from verl_pte.vllm import engine_args

    arguments = EngineArgs(
        **engine_args(run.model, adapter=run.adapter, max_prompt_length=run.max_prompt_length),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=run.max_model_len,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
        enforce_eager=not run.compile,
        enable_prefix_caching=run.prefix_caching,
        num_gpu_blocks_override=None if run.blocks is None else run.blocks + 1,  # one of them is vLLM's null block
        kv_cache_memory_bytes=run.kv_cache_bytes,
        scheduling_policy="priority" if run.priorities else "fcfs",
        tensor_parallel_size=run.tensor_parallel_size,
        logprobs_mode="processed_logprobs",  # verl's: after temperature
    )
    config = arguments.create_engine_config()
    # vLLM switches asynchronous scheduling off on CPUs; its scheduler and engine loop run there all the same.
    config.scheduler_config.async_scheduling = run.async_scheduling
    return LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=run.subprocess)


def answer(run: Run) -> dict:
    """Serve a run's requests, all added at once."""
    from vllm import SamplingParams

    llm = engine(run)
    core = None if run.subprocess else llm.engine_core.engine_core
    if run.weights is not None:
        from safetensors.torch import load_file

        # Under the old weights, past an eviction: nothing that was computed from them may be used afterwards.
        old = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True, detokenize=False)
        llm.add_request("old", {"prompt_token_ids": run.prompts[0]}, old)
        while llm.has_unfinished_requests():
            llm.step()
        model = core.model_executor.driver_worker.worker.model_runner.get_model()
        model.load_weights(load_file(run.weights).items())
        llm.reset_prefix_cache()
    arrivals, waiting = run.arrive_at or [0] * len(run.prompts), set(range(len(run.prompts)))
    outputs, steps = {}, 0
    while waiting or llm.has_unfinished_requests():
        for i in sorted(i for i in waiting if arrivals[i] <= steps):
            waiting.remove(i)
            sampling = {key: value + i if key == "seed" else value for key, value in run.sampling.items()}
            params = SamplingParams(
                max_tokens=run.max_tokens[i], ignore_eos=True, logprobs=0, detokenize=False, **sampling
            )
            priority = run.priorities[i] if run.priorities else 0
            llm.add_request(str(i), {"prompt_token_ids": run.prompts[i]}, params, priority=priority)
        for output in llm.step():
            outputs[int(output.request_id)] = output
            if int(output.request_id) in run.abort and len(output.outputs[0].token_ids) >= 10:
                llm.abort_request([output.request_id])
        steps += 1
        if steps in run.reset_at:
            llm.reset_prefix_cache(reset_running_requests=True)
        if steps in run.preempt_at:
            preempt(core.scheduler)
    found = {"requests": [of(outputs[i]) for i in range(len(run.prompts))], "steps": steps}
    if core is not None:
        found["async"] = core.batch_queue is not None
        found["free_blocks"] = core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        found["num_blocks"] = core.scheduler.kv_cache_config.num_blocks
        found["compile_key"] = core.vllm_config.compute_hash()
    llm.engine_core.shutdown()
    return found


def preempt(scheduler) -> None:
    """What the scheduler does with a victim when blocks are short, to everything that runs."""
    while scheduler.running:
        scheduler._preempt_request(scheduler.running.pop(), time.monotonic())


def of(output) -> dict:
    """What of a request's output is compared."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    return {
        "token_ids": tokens,
        "log_probs": [entry[token].logprob for entry, token in zip(completion.logprobs, tokens, strict=True)],
        "finish_reason": completion.finish_reason,
        "cached": output.num_cached_tokens,
        **((output.kv_transfer_params or {}).get("pte") or {}),
    }


def main() -> None:
    """Carry out the runs described in one file and write what came of them to another."""
    from vllm.distributed import cleanup_dist_env_and_memory

    runs = [Run(**run) for run in json.loads(Path(sys.argv[1]).read_text())]
    found = []
    for run in runs:
        found.append(answer(run))
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
