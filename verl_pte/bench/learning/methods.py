"""What is compared: each method is PTE's own code under other settings.

`base` is the base model under the window, untrained. The others train an adapter on it.
"""

from typing import Any, NamedTuple

from verl_pte.config import PTEConfig


class Method(NamedTuple):
    """A title, and the settings that differ from `pte_settings`' small ones."""

    title: str
    knobs: dict[str, Any]


METHODS = {
    "base": Method("base under the window", {"freeze_state": True}),
    "lora_c": Method("LoRA_c", {"freeze_state": True}),
    "lora_full": Method("LoRA, full cache", {"freeze_state": True, "window": None}),
    "pte": Method("PTE", {}),
    "pte_frobenius": Method("PTE, Frobenius", {"normalize": "frobenius"}),
    "pte_literal": Method("PTE, literal update", {"update_strength": None, "normalize": "frobenius"}),
    "global_only": Method("Global-Only", {"update_state": False}),
    "global_0": Method("#Global-0", {"num_global_tokens": 0}),
    "global_8": Method("#Global-8", {"num_global_tokens": 8}),
    "global_64": Method("#Global-64", {"num_global_tokens": 64}),
}
QUICK_METHODS = ("pte", "lora_c", "global_only")


def pte_settings(method: str, **knobs: Any) -> PTEConfig:
    """The PTE settings of a method: small sizes for small models, then `knobs`, then the method's own."""
    small: dict[str, Any] = dict(rank=16, alpha=32.0, num_global_tokens=32, window=16, block_size=4)
    return PTEConfig(**small | knobs | METHODS[method].knobs)
