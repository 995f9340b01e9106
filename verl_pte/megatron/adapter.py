"""State-modulated LoRA of megatron-core's linears, which are spread over tensor-parallel ranks.

megatron-core merges linears that share an input (query, key and value; gate and up). Each part keeps the adapter it
has in the Hugging Face model, so that adapters go back and forth.

    column   y_local = W_local x + expand(S (lora_A x)) lora_B_local^T      lora_A whole, lora_B cut along its rows
    row      y = reduce(W_local x_local) + lora_B (S reduce(lora_A_local x_local))    lora_A cut along its columns

`reduce` adds over ranks; `expand` is the identity whose gradient is added over ranks. Only rank-wide tensors travel
for the adapter. Under sequence parallelism each rank has some of the tokens at a column's input and a row's output, so
it runs the replicated parts (lora_A of a column, lora_B of a row, and S) for those alone: `expand` becomes a gather of
tokens, `reduce` a scatter of them, and the gradients of what is replicated are parts of a sum: the parameters say so
to megatron-core by `sequence_parallel`, the state by the layer (layer.py).

Left out: expert layers, linears with `gather_output`.

Shape suffixes: N tokens of the call (of this rank, under sequence parallelism), B sequences, I in_features, O
out_features of this rank, R rank.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from verl_pte.core.adapter import StateLoRA
from verl_pte.megatron.collectives import expand, reduce
from verl_pte.megatron.placement import place, sharded


class Lent:
    """What a decoder layer lends its linears for one forward."""

    enabled = True
    state_BRR: Tensor | None = None  # None stands for the identity


class _ParallelLoRA(nn.Module):
    """One rank's part of a StateLoRA; made whole and then cut, so that all shardings start alike."""

    def __init__(
        self, whole: StateLoRA, group: Any, sequence_parallel: bool, cut: tuple[int | None, int | None]
    ) -> None:
        super().__init__()
        self.scaling, self.group, self.sequence_parallel = whole.scaling, group, sequence_parallel
        self.lora_A, self.lora_B = whole.lora_A, whole.lora_B
        for linear, dim in ((self.lora_A, cut[0]), (self.lora_B, cut[1])):
            weight: Any = linear.weight
            place(weight, dim, group)
            if dim is None:
                weight.sequence_parallel = sequence_parallel

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """For megatron-core's distributed checkpoints."""
        return sharded(self, prefix, sharded_offsets, metadata, self.group)


class ColumnLoRA(_ParallelLoRA):
    """Update of a linear whose output is spread over ranks."""

    def __init__(self, whole: StateLoRA, group: Any, sequence_parallel: bool) -> None:
        super().__init__(whole, group, sequence_parallel, (None, 0))

    def forward(self, x_NBI: Tensor, state_BRR: Tensor | None) -> Tensor:
        """The rank's part of the update, of all tokens: [N, B, O]."""
        h_NBR = _modulate(self.lora_A(x_NBI.to(self.lora_A.weight.dtype)), state_BRR)
        if self.sequence_parallel:
            h_NBR = gather_from_sequence_parallel_region(h_NBR, tensor_parallel_output_grad=True, group=self.group)
        else:
            h_NBR = expand(h_NBR, self.group)
        return nn.functional.linear(h_NBR, self.lora_B.weight) * self.scaling


class RowLoRA(_ParallelLoRA):
    """Update of a linear whose input is spread over ranks."""

    def __init__(self, whole: StateLoRA, group: Any, sequence_parallel: bool) -> None:
        super().__init__(whole, group, sequence_parallel, (1, None))

    def forward(self, x_NBI: Tensor, state_BRR: Tensor | None) -> Tensor:
        """The update, of the rank's tokens under sequence parallelism, else of all: [N, B, O]."""
        part_NBR = self.lora_A(x_NBI.to(self.lora_A.weight.dtype))
        if self.sequence_parallel:
            h_NBR = reduce_scatter_to_sequence_parallel_region(part_NBR, group=self.group)
        else:
            h_NBR = reduce(part_NBR, self.group)
        return nn.functional.linear(_modulate(h_NBR, state_BRR), self.lora_B.weight) * self.scaling


class AdaptedLinear(MegatronModule):
    """A frozen megatron-core linear and the updates of the parts it is merged from.

    Args:
        base: column- or row-parallel linear.
        parts: (name, out_features of this rank, update or None) of each part, in order.
        kv_heads: of this rank, where the output interleaves the parts a kv head at a time (query, key, value); None
            where it has them one after the other.
        lent: the decoder layer's.
    """

    def __init__(
        self,
        base: MegatronModule,
        parts: list[tuple[str, int, _ParallelLoRA | None]],
        kv_heads: int | None,
        lent: Lent,
    ) -> None:
        super().__init__(base.config)
        self.base_layer, self.kv_heads, self.lent = base, kv_heads, lent
        self.parts = [(name, width) for name, width, _ in parts]
        for name, _, update in parts:
            if update is not None:
                self.add_module(name, update)

    def forward(self, x_NBI: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The base's output with the updates added, and its bias."""
        y_NBO, bias = self.base_layer(x_NBI, *args, **kwargs)
        if not self.lent.enabled:
            return y_NBO, bias
        updates = []
        for name, width in self.parts:
            update = getattr(self, name, None)
            if update is None:
                updates.append(y_NBO.new_zeros(*y_NBO.shape[:2], width))
            else:
                updates.append(update(x_NBI, self.lent.state_BRR))
        if self.kv_heads is not None:
            updates = [u.unflatten(2, (self.kv_heads, -1)) for u in updates]
        update_NBO = torch.cat(updates, -1) if len(updates) > 1 else updates[0]
        return y_NBO + update_NBO.reshape(y_NBO.shape).to(y_NBO.dtype), bias

    def adapters(self) -> list[tuple[str, _ParallelLoRA]]:
        """(name, update) of the adapted parts, in order."""
        return [(name, getattr(self, name)) for name, _ in self.parts if hasattr(self, name)]


def _modulate(h_NBR: Tensor, state_BRR: Tensor | None) -> Tensor:
    if state_BRR is None:
        return h_NBR
    return torch.einsum("nbr,bqr->nbq", h_NBR, state_BRR.to(h_NBR.dtype))
