"""NativeReplica: starts one rollout server beside each training worker.

The server shares its worker's device: it takes no Ray resource of its own and is shown the same accelerator, as
verl's colocated rollouts are.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.plugin.platform import get_platform
from verl.workers.rollout.replica import RolloutReplica

from verl_pte.verl.server import RolloutServer


def server_name(replica_rank: int) -> str:
    """Ray's name of a replica's server, under which its training worker finds it."""
    return f"pte_server_{replica_rank}"


class NativeReplica(RolloutReplica):
    """A replica of one server on one device."""

    async def launch_servers(self) -> None:
        """Start the server where its worker runs, and wait until its engine is built."""
        assert len(self.workers) == self.world_size == 1, "checks.py admits replicas of one worker only"
        node, env = await self.workers[0].__ray_call__.remote(_where)
        # Set before the process starts: importing verl already fixes which devices it sees.
        options: dict[str, Any] = {"runtime_env": {"env_vars": env}} if env else {}
        server = (
            ray.remote(RolloutServer)
            .options(
                name=server_name(self.replica_rank),
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
                **options,
            )
            .remote(self.config, self.model_config, self.replica_rank)
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = server_name(self.replica_rank)  # verl's router only needs it to be unique


def _where(worker: Any) -> tuple[str, dict[str, str]]:
    """(node, environment that shows a process the worker's accelerator); executed in the worker.

    Its platform counts, not that of the process that asks, which may run on a head node without accelerators.
    """
    context, platform = ray.get_runtime_context(), get_platform()
    if platform.device_name == "cpu":
        return context.get_node_id(), {}
    ids = context.get_accelerator_ids().get(platform.ray_resource_name()) or ["0"]
    env = {platform.visible_devices_envvar(): str(ids[0]), **platform.rollout_env_vars()}
    return context.get_node_id(), env | dict.fromkeys(platform.ray_noset_envvars(), "1")
