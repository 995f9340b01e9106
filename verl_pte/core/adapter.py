"""State-modulated LoRA: a low-rank update whose middle is the sequence's thought state.

``delta(x) = (alpha / r) * lora_B(S (lora_A x))``. The paper writes Delta W = A S B; its A is ``lora_B`` here and its B
``lora_A``, as in PEFT. With S the identity it is plain LoRA. Left out: the base linear it is added to (peft/layer.py)
and where S comes from (encoder.py, cache.py).

Shape suffixes: B sequences, N tokens, I in_features, O out_features, R rank.
"""

import math

from torch import Tensor, nn


class StateLoRA(nn.Module):
    """The update of one linear layer; zero at the start because `lora_B` is."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scaling = alpha / rank
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LoRA's: Kaiming-uniform `lora_A`, zero `lora_B`."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x_BNI: Tensor, state_BRR: Tensor | None) -> Tensor:
        """The update [B, N, O] in the adapter's dtype; `state_BRR` None stands for the identity."""
        h_BNR = self.lora_A(x_BNI.to(self.lora_A.weight.dtype))
        if state_BRR is not None:
            h_BNR = h_BNR @ state_BRR.to(h_BNR.dtype).transpose(-1, -2)
        return self.lora_B(h_BNR) * self.scaling
