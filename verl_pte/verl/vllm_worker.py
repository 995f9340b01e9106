"""What a vLLM worker of verl can do beside vLLM's own work: take weights from the trainer.

vLLM mixes this class into its worker (``worker_extension_cls``). verl's own extension carries a LoRA adapter to vLLM's
LoRA manager, which has no place for a thought state; here every tensor goes to the model's ``load_weights`` by name.
"""

from typing import Any

from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


class PTEWorkerExtension(vLLMColocateWorkerExtension):
    """verl's extension with another end for weights."""

    def update_weights_from_ipc(self: Any, use_shm: bool = False) -> None:
        """Receive tensors, in buckets, and load each bucket as it comes.

        What goes wrong with a bucket is raised when all have come: the sender would wait for ever for an answer.
        """
        model, failures = self.model_runner.get_model(), []

        def load(weights: list, is_last: bool) -> None:
            try:
                model.load_weights(weights)
            except Exception as error:
                # Without its frames, which hold tensors in the transport's buffer: it could not be closed.
                failures.append(error.with_traceback(None))

        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=load)
        if failures:
            raise failures[0]

    def check_alive(self) -> None:
        """Returns; an engine that has died does not."""

    def monkey_patch_model(self, vocab_size: int, banned_token_ids: list[int] | None = None) -> None:
        """Nothing: verl masks logits beyond the tokenizer's vocabulary here, which the learner does not.

        The two would disagree on every log-probability.
        """
