"""VLLMServerAdapter: a training worker's hold on the vLLM server its weights go to."""

from collections.abc import Iterable
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter


class VLLMServerAdapter(ServerAdapter):
    """verl's adapter for rollout ``pte_vllm``: what is sent is tensors by name, base or PTE adapter."""

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **_: Any,
    ) -> None:
        """Send named tensors in buckets, then clear vLLM's prefix cache; verl's notes about LoRA are dropped."""
        assert wire_format == "named_tensors", "checks.py admits verl's naive checkpoint engine only"
        await self._execute_method("check_alive")  # with a dead engine the first bucket would wait for ever
        await super().update_weights(weights, global_steps=global_steps)
