"""Full tensors of a sharded PTE model, by the names they have in the attached model, and back into the shards.

FSDP2 keeps names and shards each parameter as a DTensor. FSDP1 flattens: a unit's parameters exist under their names
only while the unit is summoned, and its wrapper modules put their own names into the path.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, distribute_tensor
from verl.utils.device import get_device_id

_FSDP1_WRAPPER = "_fsdp_wrapped_module."


def full_adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every trainable parameter. A collective: all ranks iterate together."""
    return _full_tensors(model, adapter=True)


def full_base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every frozen parameter. A collective: all ranks iterate together."""
    return _full_tensors(model, adapter=False)


def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy full tensors into the model's adapter, whatever its sharding.

    Raises ValueError if the names are not exactly its own.
    """
    remaining = set(tensors)
    for name, parameter in _named_parameters(model, adapter=True, writeback=True):
        if name not in tensors:
            raise ValueError(f"adapter checkpoint: {name!r} is missing, so it was saved with other model.pte settings")
        full = tensors[name].to(parameter.device, parameter.dtype)
        if full.shape != parameter.shape:
            raise ValueError(
                f"adapter checkpoint: {name!r} has shape {tuple(full.shape)}, the model's has "
                f"{tuple(parameter.shape)}; check model.pte against the run that saved it"
            )
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(full)
        remaining.discard(name)
    if remaining:
        raise ValueError(f"adapter checkpoint: {sorted(remaining)[0]!r} is not in the model; check model.pte")


@torch.no_grad()
def _full_tensors(model: nn.Module, adapter: bool) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _named_parameters(model, adapter, writeback=False):
        value: Any = parameter.detach()
        if isinstance(parameter, DTensor):
            value = value.to(get_device_id())
            value = value.full_tensor()
        yield name, value


def _named_parameters(model: nn.Module, adapter: bool, writeback: bool) -> Iterator[tuple[str, nn.Parameter]]:
    if not isinstance(model, FSDP):
        yield from ((n, p) for n, p in model.named_parameters() if p.requires_grad == adapter)
        return
    for path, unit in model.named_modules():
        if not isinstance(unit, FSDP) or unit._handle is None or unit._handle.flat_param.requires_grad != adapter:
            continue
        prefix = (path + ".").replace(_FSDP1_WRAPPER, "") if path else ""
        with FSDP.summon_full_params(unit, recurse=False, writeback=writeback):
            for name, parameter in unit.module.named_parameters():
                if "_flat_param" not in name:
                    yield prefix + name.replace(_FSDP1_WRAPPER, ""), parameter
