"""The rollout engine's way through the adapters: linears that read the same input share its products.

q, k and v (gate and up) get the same tensor. One product with all their `lora_A`s laid side by side, one with the
state, and each linear adds its own `lora_B` part to the base's output in place. That is a product, a batched product
and one fused multiply-add a linear where the plain path (layer.py) takes three products a linear, most of them tiny.

`lora_A`s side by side are a copy, at a fixed address so that CUDA graphs may hold it; `refresh` makes it anew after
weights have changed. The parameters stay where and as they are. Left out: gradients, which take the plain path.

Shape suffixes: B sequences, N tokens, I in_features, O out_features, G linears of the group, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from verl_pte.core.adapter import StateLoRA, add_update

# Linears of a decoder layer that read the same input, by their names in the supported architectures.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class Lent:
    """What a decoder layer lends its linears for the time of its forward.

    Attributes:
        state_BRR: the thought state; None is the identity.
        fused: whether linears take the way of this file.
    """

    state_BRR: Tensor | None = None
    fused: bool = False


class SharedInput:
    """The updates of one group of linears, in the order in which `loras` lists them."""

    def __init__(self, loras: Sequence[StateLoRA]) -> None:
        self.loras = list(loras)
        self.scaling = self.loras[0].scaling
        self.down_GRI: Tensor | None = None
        self._input: Tensor | None = None
        self._hidden: Sequence[Tensor] = ()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the parameters as they are now."""
        parts = [lora.lora_A.weight for lora in self.loras]
        self._rank, self._up = parts[0].shape[0], [lora.lora_B.weight for lora in self.loras]
        if len(parts) == 1:
            self.down_GRI = parts[0]
            return
        old, shape = self.down_GRI, (len(parts) * self._rank, parts[0].shape[1])
        if old is None or (old.shape, old.dtype, old.device) != (shape, parts[0].dtype, parts[0].device):
            self.down_GRI = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device)
        torch.cat(parts, out=self.down_GRI)

    def add_to(self, y_BNO: Tensor, x_BNI: Tensor, index: int, state_BRR: Tensor | None) -> Tensor:
        """`y_BNO`, the base's output, plus the update of linear number `index`; overwrites it."""
        if x_BNI is not self._input:  # the first of the group to be called
            self._hidden, self._input = self._products(x_BNI, state_BRR), x_BNI
        return add_update(y_BNO, self._hidden[index], self._up[index], self.scaling, in_place=True)

    def forget(self) -> None:
        """Let go of the input and what was made of it."""
        self._input, self._hidden = None, ()

    def _products(self, x_BNI: Tensor, state_BRR: Tensor | None) -> Sequence[Tensor]:
        """``S (lora_A x)`` of every linear: [B * N, R] each."""
        assert self.down_GRI is not None, "refresh() comes first"
        h = nn.functional.linear(x_BNI.to(self.down_GRI.dtype), self.down_GRI)
        if state_BRR is not None:
            h = torch.bmm(h.view(len(h), -1, self._rank), state_BRR.transpose(1, 2))
        return h.view(-1, len(self._up), self._rank).unbind(1)
