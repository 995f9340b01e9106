"""Checkpoints of a PTE run on Megatron: the PEFT adapter that every PTE engine writes, and verl's optimizer state.

``<actor>/pte_adapter`` has full tensors under the Hugging Face model's names, so it loads at any number of ranks, in
the FSDP engine, in the rollout engines and in PEFT. Optimizer and learning rate schedule are verl's, in megatron-core's
distributed format, which loads at other tensor- and pipeline-parallel sizes too.
"""

import copy
import os

import torch
from megatron.core import parallel_state
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from verl.utils.checkpoint.megatron_checkpoint_manager import MegatronCheckpointManager
from verl.utils.megatron_utils import unwrap_model

from verl_pte.megatron import placement
from verl_pte.megatron.model import PTEGPTModel
from verl_pte.peft import attach
from verl_pte.peft.saved import ADAPTER_FOLDER, WEIGHTS, names_by_key


class MegatronAdapterCheckpointManager(MegatronCheckpointManager):
    """verl's checkpoint manager with the model part replaced by a PEFT adapter."""

    # Nothing here draws random numbers, and verl's random state would tie a checkpoint to its number of ranks.
    should_save_extra = should_load_extra = False
    # Weights are the adapter, always and nothing else.
    should_save_hf_model = should_load_hf_model = False
    should_save_dist_ckpt_model = should_load_dist_ckpt_model = False

    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """Write the adapter, the base's config and tokenizer, then what verl writes (which also removes checkpoints
        beyond `max_ckpt_to_keep`).
        """
        if local_path is None:
            return
        save_adapter(unwrap_model(self.model[0]), os.path.join(local_path, ADAPTER_FOLDER))
        if self.rank == 0:
            folder = os.path.join(local_path, "huggingface")
            self.hf_config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        torch.distributed.barrier()
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Load the adapter into this rank's parts, then what verl wrote."""
        if local_path is None:
            return
        load_adapter(unwrap_model(self.model[0]), os.path.join(local_path, ADAPTER_FOLDER))
        self.optimizer.reload_model_params()  # its float32 copies, where it has some and they are not loaded
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)


def save_adapter(model: PTEGPTModel, folder: str) -> None:
    """Write the adapter as PEFT does, float32, from any sharding. A collective of all ranks; rank 0 writes."""
    groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    tensors = {name: tensor.float().cpu() for name, tensor in placement.full_tensors(model, *groups)}
    if torch.distributed.get_rank() == 0:
        attached = _attached(model)
        attached.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)


def load_adapter(model: PTEGPTModel, folder: str) -> None:
    """Copy a saved adapter into this rank's parts.

    Raises ValueError if it has not exactly the tensors of the model's adapter.
    """
    attached = _attached(model)
    own = names_by_key(attached, [name for name, p in attached.named_parameters() if p.requires_grad])
    saved = load_file(os.path.join(folder, WEIGHTS))
    foreign = sorted(saved.keys() - own.keys())
    if foreign:
        raise ValueError(f"adapter={folder}: {foreign[0]!r} is not in the model; check model.pte")
    tensors = {own[key]: tensor for key, tensor in saved.items()}
    placement.load(model, tensors, parallel_state.get_tensor_model_parallel_group())


def _attached(model: PTEGPTModel) -> PeftModel:
    """The Hugging Face model with its adapter, without memory: who knows the names."""
    pte = copy.copy(model.pte)
    pte.inference_mode = False  # True in settings that were read from a saved adapter
    with torch.device("meta"):
        return attach(AutoModelForCausalLM.from_config(model.hf, attn_implementation="sdpa"), pte)
