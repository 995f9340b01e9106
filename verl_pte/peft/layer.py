"""Tuner layers: what PEFT finds in the model, switches off, saves and loads.

`PTELinear` wraps a linear layer; `ThoughtEncoderLayer` is a child added to each decoder layer, with no base layer of
its own. Their tensors live in ModuleDicts named ``pte_...``, one entry an adapter, as PEFT's bookkeeping expects.
"""

from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from verl_pte.config import PTEConfig
from verl_pte.core.adapter import StateLoRA
from verl_pte.core.encoder import ThoughtEncoder
from verl_pte.peft.shared_input import Lent, SharedInput

MERGE_REFUSED = (
    "a PTE adapter cannot be merged into the base weights: its update lora_B S lora_A depends on the thought state S, "
    "which differs from sequence to sequence and changes as tokens are evicted. Save the adapter and load it with "
    "PeftModel.from_pretrained instead."
)


def thought_encoder(
    kv_dim: int, config: PTEConfig, kind: Callable[..., ThoughtEncoder] = ThoughtEncoder
) -> ThoughtEncoder:
    """A new encoder, of this kind, for keys and values of `kv_dim` = kv heads x head_dim."""
    return kind(
        kv_dim,
        config.rank,
        num_global_tokens=config.num_global_tokens,
        update_strength=config.update_strength,
        update_state=config.update_state,
        normalize=config.normalize,
        attention=config.attention,
    )


class PTELinear(nn.Module, BaseTunerLayer):
    """A frozen linear plus its state-modulated update: ``y = W x + (alpha/r) lora_B(S (lora_A x))``."""

    adapter_layer_names = ("pte_adapter",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: PTEConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.pte_adapter = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Both are the decoder layer's, which shares them among its linears (model.py).
        self.lent = Lent()
        self.group: tuple[SharedInput, int] | None = None
        self.pte_adapter[adapter_name] = StateLoRA(
            base_layer.in_features, base_layer.out_features, config.rank, config.alpha
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, in] -> [B, N, out] in the base layer's dtype."""
        y = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return y
        if self.lent.fused:
            assert self.group is not None
            shared, index = self.group
            return shared.add_to(y, x, index, self.lent.state_BRR)
        for name in self.active_adapters:
            y = self.pte_adapter[name](x, self.lent.state_BRR, y)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the update is not a matrix."""
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class ThoughtEncoderLayer(nn.Module, BaseTunerLayer):
    """The thought encoder of one decoder layer, held so that PEFT saves and switches it with the linears' adapters."""

    adapter_layer_names = ("pte_encoder",)
    other_param_names = ()

    def __init__(self, kv_dim: int, adapter_name: str, config: PTEConfig, like: nn.Linear) -> None:
        super().__init__()
        self.pte_encoder = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._like = (like,)  # in a tuple, so that it is not registered as a child
        self.pte_encoder[adapter_name] = thought_encoder(kv_dim, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def get_base_layer(self) -> nn.Module:
        """The linear whose device and dtype the encoder takes; there is no layer underneath."""
        return self._like[0]

    @property
    def encoder(self) -> ThoughtEncoder | None:
        """The active encoder; None while adapters are disabled."""
        if self.disable_adapters:
            return None
        (name,) = self.active_adapters
        return self.pte_encoder[name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused, as for the linears."""
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Nothing is ever merged."""
