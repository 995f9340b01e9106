"""ServerAdapter: a training worker's hold on the rollout server beside it.

verl's training worker wakes, feeds and releases its rollout through this. Each worker serves one replica, so all of
them send the weights they gather.
"""

import os
from collections.abc import Iterable
from typing import Any

import ray
import torch
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.rollout.base import BaseRollout

from verl_pte.verl.replica import server_name
from verl_pte.verl.weight_transfer import buckets


class ServerAdapter(BaseRollout):
    """The trainer's side of rollout ``pte``."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1, **kwargs: Any) -> None:
        super().__init__(config, model_config, device_mesh, **kwargs)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.is_leader_rank = True
        self._server: Any = None

    @property
    def server(self) -> Any:
        """The server's handle; looked up late, because servers start after the workers."""
        if self._server is None:
            self._server = ray.get_actor(server_name(self.replica_rank))
        return self._server

    async def resume(self, tags: list[str]) -> None:
        """Bring back what `tags` name (weights, kv_cache)."""
        await self.server.wake_up.remote(tags=tags)

    async def release(self) -> None:
        """Free the cache."""
        await self.server.sleep.remote()

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **_: Any,
    ) -> None:
        """Send named tensors, in the rollout's dtype; `global_steps` marks the responses made with them."""
        assert wire_format == "named_tensors", "only verl's naive checkpoint engine is used with rollout `pte`"
        max_bytes = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        for bucket in buckets(weights, max_bytes, PrecisionType.to_dtype(self.config.dtype)):
            await self.server.load_weights.remote(bucket)
        if global_steps is not None:
            await self.server.set_global_steps.remote(global_steps)
