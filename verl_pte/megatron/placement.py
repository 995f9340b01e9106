"""Where the adapter's tensors lie: how each is cut over tensor-parallel ranks, and what it is called elsewhere.

A parameter knows its own cut: megatron-core's `partition_dim` where it is one of a kind on each rank, none where every
rank holds all of it. Names are those of the Hugging Face model with its PTE adapter attached, so that a checkpoint, an
export and a weight transfer are the same from every engine.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

PREFIX = "base_model.model."


def cut(full: Tensor, dim: int | None, group: Any) -> Tensor:
    """This rank's part of a full tensor."""
    return full if dim is None else full.chunk(group.size(), dim)[group.rank()].contiguous()


def place(parameter: nn.Parameter, dim: int | None, group: Any) -> None:
    """Keep this rank's part of a full parameter, and note how it was cut."""
    parameter.data = cut(parameter.data, dim, group)
    if dim is not None:
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def dimension(parameter: nn.Parameter) -> int | None:
    """Along which a parameter is cut."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def sharded(module: nn.Module, prefix: str, offsets: tuple, metadata: Any, group: Any) -> dict:
    """`sharded_state_dict` of a module whose parameters were placed."""
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    axes = {name: dim for name, p in module.named_parameters() if (dim := dimension(p)) is not None}
    return make_sharded_tensors_for_checkpoint(
        module.state_dict(prefix="", keep_vars=True),
        prefix,
        axes,
        offsets,
        tp_group=group,
        dp_cp_group=metadata["dp_cp_group"],
    )


class Placed(NamedTuple):
    """One adapter tensor of this pipeline stage."""

    name: str  # in the attached Hugging Face model
    parameter: nn.Parameter


def placed(model: nn.Module) -> Iterator[Placed]:
    """The adapter's tensors on this stage, in the same order on all its ranks. `model` is the unwrapped GPTModel."""
    for layer in model.decoder.layers:
        root = f"{PREFIX}model.layers.{layer.layer_number - 1}."
        for block, modules in (("self_attn", layer.attention_adapters()), ("mlp", layer.mlp_adapters())):
            for linear, adapter in modules:
                for name, parameter in adapter.named_parameters():
                    yield Placed(f"{root}{block}.{linear}.pte_adapter.default.{name}", parameter)
        if layer.thought_encoder is not None:
            for name, parameter in layer.thought_encoder.named_parameters():
                yield Placed(f"{root}thought_encoder.pte_encoder.default.{name}", parameter)


@torch.no_grad()
def gather(parameter: nn.Parameter, group: Any) -> Tensor:
    """The full tensor of a placed parameter. A collective over the tensor-parallel ranks."""
    dim = dimension(parameter)
    if dim is None or group.size() == 1:
        return parameter.detach()
    parts = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(parts, parameter.detach().contiguous(), group=group)
    return torch.cat(parts, dim)


@torch.no_grad()
def load(model: nn.Module, tensors: Mapping[str, Tensor], tensor_group: Any) -> None:
    """Copy full adapter tensors, by their names in the attached model, into this rank's parts.

    Raises ValueError if one is missing or has another shape.
    """
    for name, parameter in placed(model):
        if name not in tensors:
            raise ValueError(f"adapter: {name!r} is missing, so it was saved with other model.pte settings")
        part = cut(tensors[name], dimension(parameter), tensor_group)
        if part.shape != parameter.shape:
            raise ValueError(
                f"adapter: {name!r} has shape {tuple(tensors[name].shape)}, of which this rank would take "
                f"{tuple(part.shape)}; its own is {tuple(parameter.shape)}: check model.pte against the run that "
                "saved it"
            )
        parameter.copy_(part)


def full_tensors(model: nn.Module, tensor_group: Any, pipeline_group: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of the whole adapter, stage after stage, on every rank.

    A collective over tensor- and pipeline-parallel ranks, which iterate together.
    """
    device = next(p.device for p in model.parameters() if p.requires_grad)  # the base may be offloaded
    yield from from_all_stages(
        ((name, gather(parameter, tensor_group)) for name, parameter in placed(model)), pipeline_group, device
    )


def from_all_stages(
    own: Iterator[tuple[str, Tensor]], group: Any, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """What each pipeline stage iterates over, one stage after the other, on all of them. A collective."""
    if group.size() == 1:
        yield from own
        return
    for stage in range(group.size()):
        source = dist.get_global_rank(group, stage)
        while True:
            item = next(own, None) if stage == group.rank() else None
            about = [None if item is None else (item[0], item[1].shape, item[1].dtype)]
            dist.broadcast_object_list(about, src=source, group=group, device=device)
            if about[0] is None:
                break
            name, shape, dtype = about[0]
            tensor = torch.empty(shape, dtype=dtype, device=device) if item is None else item[1].contiguous()
            dist.broadcast(tensor, src=source, group=group)
            yield name, tensor
