"""What of a verl run is ours, by name, and its registration: training engines, rollout and agent loop.

`register` is called when a PTEModelConfig is built, in every process that has one. verl's engine package is heavy and
its agent loops heavier, so the loop registers only where they are loaded already.
"""

import sys
from typing import Any

from verl_pte.verl.megatron_checks import megatron_problem

MODEL_TARGET = "verl_pte.verl.config.PTEModelConfig"
ROLLOUT = "pte"
VLLM_ROLLOUT = "pte_vllm"
AGENT_LOOP = "pte_single_turn"

ROLLOUTS = (ROLLOUT, VLLM_ROLLOUT)
_registered = False


def mentions_pte(config: Any) -> bool:
    """Whether a composed verl config asks for anything of ours."""
    actor = config.get("actor_rollout_ref", None)
    return actor is not None and (is_pte_model(actor.model) or str(actor.rollout.get("name", "")) in ROLLOUTS)


def is_pte_model(model: Any) -> bool:
    """Whether a model block of a verl config is a PTE model's."""
    return str(model.get("_target_", "")) == MODEL_TARGET or model.get("pte", None) is not None


def register() -> None:
    """Register everything; does nothing the second time."""
    global _registered
    if not _registered:
        from verl.workers.rollout import base, replica

        import verl_pte.verl.fsdp_engine

        # Where verl could import megatron-core; another version of it must not stop a run on FSDP.
        if "verl.workers.engine.megatron.transformer_impl" in sys.modules and megatron_problem() is None:
            import verl_pte.verl.megatron_engine  # noqa: F401

        base._ROLLOUT_REGISTRY[(ROLLOUT, "async")] = "verl_pte.verl.server_adapter.ServerAdapter"
        base._ROLLOUT_REGISTRY[(VLLM_ROLLOUT, "async")] = "verl_pte.verl.vllm_server_adapter.VLLMServerAdapter"
        replica.RolloutReplicaRegistry.register(ROLLOUT, _load_replica)
        replica.RolloutReplicaRegistry.register(VLLM_ROLLOUT, _load_vllm_replica)
        _registered = True
    agent_loops = sys.modules.get("verl.experimental.agent_loop.agent_loop")
    if agent_loops is not None:
        agent_loops._agent_loop_registry[AGENT_LOOP] = {"_target_": "verl_pte.verl.agent_loop.SeededSingleTurnLoop"}


def _load_replica() -> type:
    from verl_pte.verl.replica import NativeReplica

    return NativeReplica


def _load_vllm_replica() -> type:
    from verl_pte.verl.vllm_server import VLLMReplica

    return VLLMReplica
