"""State-modulated LoRA: a low-rank update whose middle is the sequence's thought state.

``delta(x) = (alpha / r) * lora_B(S (lora_A x))``. The paper writes Delta W = A S B; its A is ``lora_B`` here and its B
``lora_A``, as in PEFT. With S the identity it is plain LoRA. Left out: the base linear, to whose output it is added
(peft/layer.py), and where S comes from (encoder.py, cache.py).

Shape suffixes: B sequences, N tokens, M = B * N, I in_features, O out_features, R rank.
"""

import math

from torch import Tensor, nn


def add_update(y_BNO: Tensor, h_MR: Tensor, up_OR: Tensor, scaling: float, *, in_place: bool = False) -> Tensor:
    """``y + scaling * h up^T``, [B, N, O] in y's dtype, for the M = B * N tokens of y.

    In one operation where dtypes are equal, as they are where a sharded model or a rollout computes: in three, every
    output of a linear would be read and written twice more. `in_place` overwrites y then.
    """
    if not y_BNO.dtype == h_MR.dtype == up_OR.dtype:
        return y_BNO + (nn.functional.linear(h_MR, up_OR) * scaling).to(y_BNO.dtype).view_as(y_BNO)
    y_MO = y_BNO.flatten(0, -2)
    add = y_MO.addmm_ if in_place else y_MO.addmm
    return add(h_MR, up_OR.t(), alpha=scaling).view_as(y_BNO)


class UpProjection(nn.Linear):
    """`lora_B`, which adds its product to what the base linear gave. A leaf that is called: FSDP1 gathers only such."""

    def forward(self, h_BNR: Tensor, y_BNO: Tensor, scaling: float) -> Tensor:  # type: ignore[override]
        """``y + scaling * lora_B h``."""
        return add_update(y_BNO, h_BNR.flatten(0, -2), self.weight, scaling)


class StateLoRA(nn.Module):
    """Adds its update to what one linear layer gave; zero at the start because `lora_B` is."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scaling = alpha / rank
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = UpProjection(rank, out_features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LoRA's: Kaiming-uniform `lora_A`, zero `lora_B`."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x_BNI: Tensor, state_BRR: Tensor | None, y_BNO: Tensor) -> Tensor:
        """`y_BNO`, the base linear's output, plus the update; `state_BRR` None stands for the identity."""
        h_BNR = self.lora_A(x_BNI.to(self.lora_A.weight.dtype))
        if state_BRR is not None:
            h_BNR = h_BNR @ state_BRR.to(h_BNR.dtype).transpose(-1, -2)
        return self.lora_B(h_BNR, y_BNO, self.scaling)
