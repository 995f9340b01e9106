"""Native rollout engine: continuous batching over the bounded cache's fixed slots; torch and transformers only."""

from verl_pte.engine.async_engine import AsyncRolloutEngine
from verl_pte.engine.engine import RolloutEngine
from verl_pte.engine.request import RolloutOutput
from verl_pte.engine.sampling import SamplingParams

__all__ = ["AsyncRolloutEngine", "RolloutEngine", "RolloutOutput", "SamplingParams"]
