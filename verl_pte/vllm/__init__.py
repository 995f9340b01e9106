"""PTE rollouts on vLLM 0.27.1 as released: bounded cache, a thought state per request, no fork.

Everything goes through vLLM's plugin points: a registered model per architecture (models.py), a KV cache spec with its
manager (kv_cache.py), subclassed attention backends (attention.py), scheduler classes (scheduler.py) and worker
classes (worker.py). `engine_args` names them all::

    from vllm import LLM
    from verl_pte.vllm import engine_args
    llm = LLM(**engine_args("path/to/model", adapter="path/to/adapter"), max_model_len=32768)

Importing this package imports nothing of vLLM. Left out: pipeline and context parallelism, speculative decoding,
quantised KV caches, LoRA beside PTE (settings.py refuses them), and vLLM's second model runner.
"""

from typing import Any

__all__ = ["engine_args"]


def __getattr__(name: str) -> Any:
    # On use: vLLM loads the plugin beside this file in every one of its processes, also where PTE is not used.
    if name == "engine_args":
        from verl_pte.vllm.settings import engine_args

        return engine_args
    raise AttributeError(f"module 'verl_pte.vllm' has no attribute {name!r}")
