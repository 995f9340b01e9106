"""What PTE's training engines share, whatever spreads the model: one batch through the replay and verl's own loss.

A mixin in front of one of verl's engine classes. It owns the micro-batch loop: replay without gradients, verl's loss
on the resulting log-probs and entropy as leaves, then the replay backwards with the leaves' gradients
(learner/replay.py). Any loss that sees log-probs and entropy works.

Left out: building, sharding and exporting the model (fsdp_engine.py, megatron_engine.py); packed rows, distillation
losses (checks.py refuses them).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine.utils import postprocess_batch_func, prepare_micro_batches

from verl_pte.verl.metrics import RolloutFacts, mean_over_sequences
from verl_pte.verl.micro_batch import MicroBatch

# Of a replay: log-probs and the like on ranks that have the output layer, None on others.
Found = Any


class ReplayEngine:
    """Mixin: `forward_backward_batch` and what it measures.

    An engine provides `_replay`, `_adapter_norm` and `_adapter_disabled`, and sets `_facts` to None whenever it hands
    out weights.
    """

    pte: Any
    model_config: Any
    scaler: Any = None  # of FSDP's float16; megatron-core scales losses itself
    get_data_parallel_group: Callable[[], Any]
    get_data_parallel_size: Callable[[], int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pte = self.model_config.pte
        self._is_reference = False
        self._facts: dict[str, float] | None = None  # of the rollouts made with the current weights

    def _replay(self, batch: MicroBatch, **settings: Any) -> Any:
        """A replay of these sequences; `settings` as of `learner.Replay`."""
        raise NotImplementedError

    def _adapter_norm(self) -> float:
        """Of the whole adapter. All ranks call it."""
        raise NotImplementedError

    def _adapter_disabled(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model is its untouched base."""
        raise NotImplementedError

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """Log-probs of a batch and, unless `forward_only`, the gradients of `loss_function` on them.

        Empty on ranks without the output layer.
        """
        group = self.get_data_parallel_group()
        self._describe_batch(data, group)
        micro_batches, indices = prepare_micro_batches(data=data, dp_group=group, same_micro_num_in_dp=True)
        measure = self._facts is None and not self._is_reference
        facts, outputs, replays = RolloutFacts(), [], []
        for index, micro_batch in enumerate(micro_batches):
            batch = MicroBatch(micro_batch.to(get_device_id()))
            full_reference = self._is_reference and self.pte.reference_cache == "full"
            schedule = self.pte.schedule()
            replay = self._replay(
                batch,
                temperature=batch.temperature,
                schedule=schedule.full() if full_reference else schedule,
                entropy=tu.get_non_tensor_data(data=batch.data, key="calculate_entropy", default=False),
            )
            found = replay.forward()
            last = index == len(micro_batches) - 1
            if found is None:
                if not forward_only:
                    replay.backward(None, last=last)
                continue
            if measure:
                self._measure(facts, batch, found.log_probs)
            outputs.append(self._loss_and_gradients(batch, replay, found, loss_function, forward_only, last))
            replays.append((found.state_norm, found.update_ratio, len(batch)))
        if not outputs:
            return {}
        if measure:
            self._facts = facts.reduce(group, get_device_id())
        result = postprocess_batch_func(output_lst=outputs, indices=indices, data=data)
        if not forward_only:
            norms, ratios, sizes = zip(*replays, strict=True)
            metrics = dict(self._facts or {})
            for key, values in (("pte/state_norm", norms), ("pte/update_ratio", ratios)):
                mean = mean_over_sequences(values, sizes, group, get_device_id())
                if mean is not None:
                    metrics[key] = mean
            # As lists: the form of a metric that was collected over micro-batches.
            result["metrics"].update({key: [value] for key, value in metrics.items()})
        return result

    def train_batch(self, data: TensorDict, loss_function: Callable) -> dict[str, Any]:
        """verl's optimizer step, with the adapter's norm after it."""
        outputs = super().train_batch(data, loss_function)  # type: ignore[misc]
        norm = self._adapter_norm()
        if "metrics" in outputs:
            outputs["metrics"]["pte/adapter_norm"] = [norm]
        return outputs

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The reference policy: the base without adapter, under the cache that `reference_cache` names."""
        self._is_reference = True
        try:
            with self._adapter_disabled():
                yield
        finally:
            self._is_reference = False

    def _describe_batch(self, data: TensorDict, group: Any) -> None:
        """Tell verl's losses over what they are averaged: the tokens of all ranks, and how many ranks there are."""
        num_tokens = data["loss_mask"].sum().to(get_device_id())
        torch.distributed.all_reduce(num_tokens, group=group)
        tu.assign_non_tensor(
            data,
            sp_size=1,
            dp_size=self.get_data_parallel_size(),
            batch_num_tokens=num_tokens.item(),
        )

    def _loss_and_gradients(
        self,
        batch: MicroBatch,
        replay: Any,
        found: Found,
        loss_function: Callable | None,
        forward_only: bool,
        last: bool,
    ) -> dict[str, Any]:
        leaves = [t for t in (found.log_probs, found.entropy) if t is not None]
        with torch.set_grad_enabled(not forward_only):
            for leaf in leaves:
                leaf.requires_grad_(not forward_only)
            packed = dict(zip(("log_probs", "entropy"), (batch.pack(leaf) for leaf in leaves), strict=False))
            loss, metrics = torch.tensor(1.0), {}
            if loss_function is not None:
                loss, metrics = loss_function(
                    model_output=packed, data=batch.data, dp_group=self.get_data_parallel_group()
                )
        if forward_only:
            return {"model_output": packed, "loss": loss.item(), "metrics": metrics}
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        replay.backward(*gradients, last=last)
        return {"loss": loss.item(), "metrics": metrics}

    def _measure(self, facts: RolloutFacts, batch: MicroBatch, log_probs_BT: torch.Tensor) -> None:
        schedule = self.pte.schedule()
        facts.add(
            log_probs=[row[:n].detach() for row, n in zip(log_probs_BT, batch.response_lens, strict=True)],
            rollout_log_probs=batch.per_response("rollout_log_probs"),
            response_masks=batch.per_response("response_mask") or [],
            facts=batch.rollout_facts(),
            cache_limits=[schedule.cache_limit(len(prompt)) for prompt in batch.prompts],
        )
