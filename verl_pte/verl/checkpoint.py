"""Checkpoints of a PTE run: a PEFT adapter in place of verl's copies of the whole model.

verl saves every rank's shard of all weights at every step it saves. Here only the adapter changes, so a checkpoint's
weights are ``<actor>/pte_adapter``, which ``peft.PeftModel.from_pretrained(base, path)`` loads as it is, on any
number of ranks. Optimizer, learning rate schedule and random state stay verl's, as do rotation and the tokenizer and
config under ``huggingface/``.
"""

import os

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

from verl_pte.peft.saved import ADAPTER_FOLDER, WEIGHTS, names_by_key
from verl_pte.verl.adapter_tensors import full_adapter_tensors, load_adapter_tensors


class AdapterCheckpointManager(FSDPCheckpointManager):
    """verl's checkpoint manager with the model part replaced by a PEFT adapter."""

    @property
    def should_save_model(self) -> bool:
        """No: verl's model shards are not written; the adapter is, always."""
        return False

    @property
    def should_load_model(self) -> bool:
        """No: the adapter is loaded instead, always."""
        return False

    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """Write the adapter, then what verl writes (which also removes checkpoints beyond `max_ckpt_to_keep`)."""
        if local_path is None:
            return
        tensors = {name: tensor.cpu() for name, tensor in full_adapter_tensors(self.model)}
        if self.rank == 0:
            model = _peft_model(self.model)
            model.save_pretrained(
                os.path.join(local_path, ADAPTER_FOLDER), state_dict=tensors, save_embedding_layers=False
            )
        torch.distributed.barrier()
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Load the adapter into the shards, then what verl wrote."""
        if local_path is None:
            return
        load_adapter(self.model, os.path.join(local_path, ADAPTER_FOLDER))
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)


def load_adapter(model: torch.nn.Module, folder: str) -> None:
    """Copy the tensors of a saved adapter into the model's own, whatever its sharding. A collective.

    Raises ValueError if they are not exactly its own.
    """
    own = names_by_key(_peft_model(model), [name for name, _ in full_adapter_tensors(model)])
    saved = load_file(os.path.join(folder, WEIGHTS))
    load_adapter_tensors(model, {own.get(key, key): tensor for key, tensor in saved.items()})


def _peft_model(model: torch.nn.Module) -> PeftModel:
    return model._fsdp_wrapped_module if isinstance(model, FSDP) else model
