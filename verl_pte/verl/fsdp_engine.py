"""PTEEngine: verl's FSDP engine with the segment-streamed replay in place of one forward and backward.

It attaches a PTE adapter to the base, a new one or a saved one (``model.lora_adapter_path``), and trains only that.
What is done with a batch is replay_engine.py's; everything else, sharding, offloading, optimizer, schedules, is verl's.

Runs under FSDP2, and on GPUs under FSDP1, whose wrapping rule needs every trainable tensor to be the ``weight`` of a
leaf module that is called. What was run: this engine under FSDP2 with two CPU ranks over gloo; under FSDP1 the replay
alone on so wrapped a model, also with two CPU ranks, in float32 and bfloat16 (tests/test_fsdp.py). Neither on a GPU.
Left out: sequence parallelism (checks.py refuses it).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from verl.utils.fs import copy_to_local
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from verl_pte.learner import Replay
from verl_pte.peft import attach
from verl_pte.verl.adapter_tensors import full_adapter_tensors, full_base_tensors
from verl_pte.verl.checkpoint import AdapterCheckpointManager, load_adapter
from verl_pte.verl.config import MODEL_TYPE
from verl_pte.verl.micro_batch import MicroBatch
from verl_pte.verl.replay_engine import ReplayEngine


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda"])
@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cpu"])
class PTEEngine(ReplayEngine, FSDPEngineWithLMHead):
    """Trains the PTE adapter of a causal LM."""

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

    # -- for ReplayEngine
    # --------------------------------------------------------------------------------------------------------

    def _replay(self, batch: MicroBatch, **settings: Any) -> Replay:
        return Replay(self.module, batch.prompts, batch.responses, group=self.get_data_parallel_group(), **settings)

    def _adapter_disabled(self) -> contextlib.AbstractContextManager[None]:
        return self.module.disable_adapter()

    def _adapter_norm(self) -> float:
        parameters = [p.detach() for p in self.module.parameters() if p.requires_grad]
        if isinstance(self.module, FSDP):  # flat shards, of which every rank has its own
            squares = torch.stack([p.double().square().sum() for p in parameters]).sum()
            group = self.device_mesh["fsdp"].get_group() if self.device_mesh.ndim > 1 else None
            torch.distributed.all_reduce(squares, group=group)
            return float(squares.sqrt())
        norm = torch.nn.utils.get_total_norm(parameters)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # -- weights
    # -----------------------------------------------------------------------------------------------

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
