"""verl's single-turn agent loop, with a seed for every response.

The loop is where verl still knows which step, prompt and response a request belongs to; the server sees a random id.
"""

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from verl_pte.verl.sampling import derive_seed


class SeededSingleTurnLoop(SingleTurnAgentLoop):
    """Registered as ``pte_single_turn`` (components.py)."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """verl's run, with `seed` in the sampling parameters.

        Raises ValueError if the caller does not number a prompt's responses.
        """
        if kwargs.get("session_id") is None:
            raise ValueError(
                "session_id=None: must be the response's number among its prompt's, or all n of them would be sampled "
                "with one seed; verl's trainer gives it with trainer.use_v1=True"
            )
        seed = derive_seed(
            self.rollout_config.seed,
            kwargs.get("global_steps"),
            str(kwargs.get("index")),
            [dict(message) for message in kwargs["raw_prompt"]],
            kwargs["session_id"],
        )
        return await super().run({**sampling_params, "seed": seed}, **kwargs)
