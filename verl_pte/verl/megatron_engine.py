"""PTEMegatronEngine: verl's Megatron engine with PTE's model and replay (verl_pte/megatron).

verl's engine gets its model from megatron-bridge. This one builds a GPTModel itself, with adapter and frozen base,
before it is wrapped with DDP, and reads the base's safetensors, so neither megatron-bridge nor Transformer Engine is
needed. Optimizer, schedule and gradient hooks are verl's; what is done with a batch is replay_engine.py's.

Ranks without the output layer (pipeline stages before the last) return nothing from a batch, as in verl's engine.

What was run: this engine with CPU ranks over gloo, megatron-core made to do without a GPU by tests/megatron. Not on
GPUs, and not under `main_ppo`. Left out: context parallelism, virtual stages, experts (megatron_checks.py refuses
them).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed import DistributedDataParallelConfig as DDPConfig
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from omegaconf import OmegaConf
from torch import Tensor
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fs import copy_to_local
from verl.utils.megatron_utils import get_model, unwrap_model
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from verl_pte.megatron import base, placement
from verl_pte.megatron.config import transformer_config
from verl_pte.megatron.model import PTEGPTModel
from verl_pte.megatron.replay import MegatronReplay
from verl_pte.verl.config import MODEL_TYPE
from verl_pte.verl.megatron_checkpoint import MegatronAdapterCheckpointManager, load_adapter
from verl_pte.verl.micro_batch import MicroBatch
from verl_pte.verl.replay_engine import ReplayEngine


@EngineRegistry.register(model_type=MODEL_TYPE, backend="megatron", device="cuda")
class PTEMegatronEngine(ReplayEngine, MegatronEngineWithLMHead):
    """Trains the PTE adapter of a causal LM that is spread over tensor- and pipeline-parallel ranks."""

    @property
    def model(self) -> PTEGPTModel:
        """This rank's part, unwrapped."""
        return unwrap_model(self.module[0])

    # -- building
    # ---------------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Build model, optimizer, schedule and checkpoint manager."""
        self._build_tf_config()
        self.module = self._build_megatron_module()
        self.optimizer = self.lr_scheduler = None
        if not self.engine_config.forward_only:
            self.optimizer = self._build_optimizer()
            self.lr_scheduler = self._build_lr_scheduler()
            self.checkpoint_mananager = self._checkpoint_manager()  # verl's spelling
        self.to(device="cpu", model=self._is_offload_param)

    def _build_tf_config(self) -> None:
        engine = self.engine_config
        self.is_value_model = False
        self.bridge = self.provider = self.peft_cls = None
        self.vanilla_bridge = False
        self.share_embeddings_and_output_weights = self.model_config.share_embeddings_and_output_weights
        self.param_dtype = self.dtype = PrecisionType.to_dtype(engine.dtype)
        self.tf_config = transformer_config(
            self.model_config.hf_config,
            tensor=engine.tensor_model_parallel_size,
            pipeline=engine.pipeline_model_parallel_size,
            sequence_parallel=engine.sequence_parallel,
            dtype=self.param_dtype,
            on_cpu=get_device_name() == "cpu",
        )

    def _build_megatron_module(self) -> list[torch.nn.Module]:
        parts = get_model(self._model_part, wrap_with_ddp=False, transformer_config=self.tf_config)
        if self.engine_config.forward_only:
            return parts
        # verl's own wrapping imports names that megatron-core 0.16 does not have yet, for optimizers refused here.
        settings = DDPConfig(use_distributed_optimizer=False, overlap_grad_reduce=False, grad_reduce_in_fp32=True)
        wrapped = [DistributedDataParallel(self.tf_config, settings, part) for part in parts]
        for part in wrapped:
            part.broadcast_params()
        return wrapped

    def _model_part(self, pre_process: bool, post_process: bool) -> PTEGPTModel:
        """With everything that has to be there before DDP looks for what is trainable."""
        model = PTEGPTModel(
            self.model_config.hf_config,
            self.pte,
            self.tf_config,
            pre_process=pre_process,
            post_process=post_process,
            seed=self.engine_config.seed,
        )
        group = parallel_state.get_tensor_model_parallel_group()
        base.load(model, base.Weights(self.model_config.local_path), group)
        start = self.model_config.lora_adapter_path
        if start is not None:  # checked by the driver (checks.py); a checkpoint that is resumed is loaded over it
            load_adapter(model, copy_to_local(start, use_shm=self.model_config.use_shm))
        return model

    def _checkpoint_manager(self) -> MegatronAdapterCheckpointManager:
        model = self.model_config
        return MegatronAdapterCheckpointManager(
            config=OmegaConf.create({"model": {"path": model.local_path}}),
            checkpoint_config=self.checkpoint_config,
            model_config=model.hf_config,
            transformer_config=self.tf_config,
            role="actor",
            model=self.module,
            arch=model.architectures[0],
            hf_config=model.hf_config,
            param_dtype=self.param_dtype,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            processing_class=model.get_processor(),
            optimizer=self.optimizer,
            optimizer_scheduler=self.lr_scheduler,
            use_distributed_optimizer=False,
            use_checkpoint_opt_param_scheduler=True,  # a resumed run goes on with its learning rates
        )

    # -- memory and checkpoints
    # --------------------------------------------------------------------------------------------------

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        """Move the frozen base to `device` if `model`. The adapter, its gradients and its optimizer state stay.

        verl's own moves the buffers of megatron-core's distributed optimizer, which this engine does without.
        """
        if model:
            for parameter in self.model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(get_device_id() if device != "cpu" else device)

    def save_checkpoint(
        self,
        local_path: str,
        hdfs_path: str | None = None,
        global_step: int = 0,
        max_ckpt_to_keep: int | None = None,
        **kwargs: Any,
    ) -> None:
        """As verl's; nothing that is saved is ever offloaded."""
        self.checkpoint_mananager.save_checkpoint(
            local_path=local_path, hdfs_path=hdfs_path, global_step=global_step, max_ckpt_to_keep=max_ckpt_to_keep
        )
        torch.distributed.barrier()

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = True, **kwargs: Any
    ) -> None:
        """As verl's."""
        self.checkpoint_mananager.load_checkpoint(
            local_path=local_path, hdfs_path=hdfs_path, del_local_after_load=del_local_after_load
        )

    # -- for ReplayEngine
    # --------------------------------------------------------------------------------------------------------

    def _replay(self, batch: MicroBatch, **settings: Any) -> MegatronReplay:
        return MegatronReplay(
            self.module[0], batch.prompts, batch.responses, adapter=not self._is_reference, **settings
        )

    def _adapter_disabled(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # `_replay` says it to each replay

    def _adapter_norm(self) -> float:
        mine = [p for p in self.model.parameters() if p.requires_grad and param_is_not_tensor_parallel_duplicate(p)]
        squares = torch.stack([p.detach().double().square().sum() for p in mine]).sum()
        torch.distributed.all_reduce(squares, group=parallel_state.get_model_parallel_group())
        return float(squares.sqrt())

    # -- weights
    # ---------------------------------------------------------------------------------------------------------

    def get_per_tensor_param(
        self, base_sync_done: bool = False, **kwargs: Any
    ) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
        """(name, full tensor) of the adapter, or of the base while `base_sync_done` is False, under the names of the
        attached Hugging Face model, on every rank.

        All ranks of a pipeline must consume what is returned, in step.
        """
        self._facts = None  # rollouts from here on are made with these weights
        if self.is_param_offload_enabled and not base_sync_done:
            self.to(device=get_device_name())  # tensors are gathered on the device; verl offloads again afterwards
        tensors = placement.full_tensors if base_sync_done else base.full_tensors
        groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
        return tensors(self.model, *groups), self.pte.to_dict()
