"""PTEEngine: verl's FSDP engine with the segment-streamed replay in place of one forward and backward.

It attaches a PTE adapter to the base, a new one or a saved one (``model.lora_adapter_path``), trains only that, and
owns the micro-batch loop: replay without gradients, verl's own loss on the resulting log-probs and entropy as leaves,
then the replay backwards with the leaves' gradients (learner/replay.py). Any loss that sees log-probs and entropy
works. Everything else, sharding, offloading, optimizer, schedules, is verl's.

Runs under FSDP2, and on GPUs under FSDP1, whose wrapping rule needs every trainable tensor to be the ``weight`` of a
leaf module that is called. What was run: this engine under FSDP2 with two CPU ranks over gloo; under FSDP1 the replay
alone on so wrapped a model, also with two CPU ranks, in float32 and bfloat16 (tests/test_fsdp.py). Neither on a GPU.
Left out: packed rows, sequence parallelism, distillation losses (checks.py refuses them).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.fs import copy_to_local
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.engine.utils import postprocess_batch_func, prepare_micro_batches

from verl_pte.learner import Replay
from verl_pte.peft import attach
from verl_pte.verl.adapter_tensors import full_adapter_tensors, full_base_tensors
from verl_pte.verl.checkpoint import AdapterCheckpointManager, load_adapter
from verl_pte.verl.config import MODEL_TYPE
from verl_pte.verl.metrics import RolloutFacts, mean_over_sequences
from verl_pte.verl.micro_batch import MicroBatch


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda"])
@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cpu"])
class PTEEngine(FSDPEngineWithLMHead):
    """Trains the PTE adapter of a causal LM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pte = self.model_config.pte
        self._is_reference = False
        self._facts: dict[str, float] | None = None  # of the rollouts made with the current weights

    # -- building
    # ---------------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Build model, optimizer and schedule; checkpoints hold the adapter alone."""
        super().initialize()
        self.checkpoint_manager = AdapterCheckpointManager(
            model=self.module,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            processing_class=self.model_config.get_processor(),
            checkpoint_config=self.checkpoint_config,
            trust_remote_code=self.model_config.trust_remote_code,
        )

    def _build_module(self) -> torch.nn.Module:
        self.model_config.model_type = "language_model"  # verl's loader knows this name and "value_model"
        try:
            return super()._build_module()
        finally:
            self.model_config.model_type = MODEL_TYPE

    def _build_lora_module(self, module: torch.nn.Module) -> torch.nn.Module:
        # verl loads weights on rank 0 and broadcasts them when it shards; the seed makes runs repeatable, ranks agree
        # anyway.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.engine_config.seed)
            module = attach(module, self.pte)
        base_dtype = next(p.dtype for p in module.parameters() if not p.requires_grad)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(base_dtype)  # FSDP wants one dtype in a group
        start = self.model_config.lora_adapter_path
        if start is not None:  # checked by the driver (checks.py); a checkpoint that is resumed is loaded over it
            load_adapter(module, copy_to_local(start, use_shm=self.model_config.use_shm))
        return module

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        module = super()._build_fsdp_module(module)
        # verl has FSDP2 cast what a unit is given to `param_dtype`, and leaves FSDP1's units to an autocast around its
        # own forward, in whose place the replay stands.
        for unit in FSDP.fsdp_modules(module):
            unit.mixed_precision.cast_forward_inputs = True
        return module

    def _build_optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        from verl.workers.config.optimizer import build_optimizer

        return build_optimizer([p for p in module.parameters() if p.requires_grad], self.optimizer_config)

    # -- one batch
    # --------------------------------------------------------------------------------------------------------

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """Log-probs of a batch and, unless `forward_only`, the gradients of `loss_function` on them."""
        group = self.get_data_parallel_group()
        self._describe_batch(data, group)
        micro_batches, indices = prepare_micro_batches(data=data, dp_group=group, same_micro_num_in_dp=True)
        measure = self._facts is None and not self._is_reference
        facts, outputs, replays = RolloutFacts(), [], []
        for index, micro_batch in enumerate(micro_batches):
            batch = MicroBatch(micro_batch.to(get_device_id()))
            replay = self._replay(batch)
            found = replay.forward()
            if measure:
                self._measure(facts, batch, found.log_probs)
            last = index == len(micro_batches) - 1
            outputs.append(self._loss_and_gradients(batch, replay, found, loss_function, forward_only, last))
            replays.append((found.state_norm, found.update_ratio, len(batch)))
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
        outputs = super().train_batch(data, loss_function)
        outputs["metrics"]["pte/adapter_norm"] = [self._adapter_norm()]
        return outputs

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

    def _replay(self, batch: MicroBatch) -> Replay:
        full_reference = self._is_reference and self.pte.reference_cache == "full"
        return Replay(
            self.module,
            batch.prompts,
            batch.responses,
            temperature=batch.temperature,
            schedule=self.pte.schedule().full() if full_reference else self.pte.schedule(),
            entropy=tu.get_non_tensor_data(data=batch.data, key="calculate_entropy", default=False),
            group=self.get_data_parallel_group(),
        )

    def _loss_and_gradients(
        self,
        batch: MicroBatch,
        replay: Replay,
        found: Any,
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

    # -- metrics
    # ----------------------------------------------------------------------------------------------------------

    def _measure(self, facts: RolloutFacts, batch: MicroBatch, log_probs_BT: torch.Tensor) -> None:
        schedule = self.pte.schedule()
        facts.add(
            log_probs=[row[:n].detach() for row, n in zip(log_probs_BT, batch.response_lens, strict=True)],
            rollout_log_probs=batch.per_response("rollout_log_probs"),
            response_masks=batch.per_response("response_mask") or [],
            facts=batch.rollout_facts(),
            cache_limits=[schedule.cache_limit(len(prompt)) for prompt in batch.prompts],
        )

    def _adapter_norm(self) -> float:
        parameters = [p.detach() for p in self.module.parameters() if p.requires_grad]
        if isinstance(self.module, FSDP):  # flat shards, of which every rank has its own
            squares = torch.stack([p.double().square().sum() for p in parameters]).sum()
            group = self.device_mesh["fsdp"].get_group() if self.device_mesh.ndim > 1 else None
            torch.distributed.all_reduce(squares, group=group)
            return float(squares.sqrt())
        norm = torch.nn.utils.get_total_norm(parameters)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # -- reference, weights
    # -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The reference policy: the base without adapter, under the cache that `reference_cache` names."""
        self._is_reference = True
        try:
            with super().disable_adapter():
                yield
        finally:
            self._is_reference = False

    def get_per_tensor_param(
        self, layered_summon: bool = False, base_sync_done: bool = False, **kwargs: Any
    ) -> tuple[Iterator[tuple[str, torch.Tensor]], dict[str, Any]]:
        """(name, full tensor) of the adapter, or of the base while `base_sync_done` is False, under the attached
        model's names.

        verl asks for the base once, if the rollout did not load it itself, and for the adapter after every step. All
        ranks must consume what is returned, in step.
        """
        self._facts = None  # rollouts from here on are made with these weights
        if isinstance(self.module, FSDP) and self.is_param_offload_enabled:
            load_fsdp_model_to_gpu(self.module)  # FSDP1 gathers on the device only; verl offloads again afterwards
        tensors = full_adapter_tensors if base_sync_done else full_base_tensors
        return tensors(self.module), self.pte.to_dict()
