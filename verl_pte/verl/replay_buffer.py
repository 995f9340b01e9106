"""A replay buffer for small runs: hands a batch over as soon as it is complete, in an order that can be repeated.

verl's own looks every 2 seconds, longer than a step of the quickstart takes, and orders a batch by when its responses
came in. Chosen by ``trainer.v1.sampler.custom_sampler``, to which verl does not pass the settings of DAPO's group
filter: for that, and for large runs, use verl's.
"""

from typing import Any

import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class PromptReplayBuffer(ReplayBuffer):
    """verl's synchronous replay buffer, polled every 50 ms, its batches sorted by their tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"poll_interval": 0.05, **kwargs})

    def _materialize_batch(
        self, partition_id: str, selected_prompt_uids: list[str], partition_snapshot: dict[str, dict]
    ) -> Any:
        batch = super()._materialize_batch(partition_id, selected_prompt_uids, partition_snapshot)
        tokens = tq.kv_batch_get(keys=batch.keys, partition_id=partition_id, select_fields=["input_ids"])["input_ids"]
        rows = [row.tolist() for row in tokens.unbind()]
        batch.reorder(sorted(range(len(rows)), key=rows.__getitem__))
        return batch
