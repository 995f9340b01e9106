"""Names of weights: what verl's trainer and PEFT call a tensor, and where it goes in a vLLM model.

The trainer sends tensors under the attached model's names
(``base_model.model.model.layers.0.self_attn.q_proj.pte_adapter.default.lora_A.weight``); a saved adapter has the same
without the adapter's name. Base weights lose PEFT's wrapping and go through vLLM's own loader.
"""

import re
from typing import NamedTuple

_LINEAR = re.compile(r"\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.pte_adapter\.(?:default\.)?(lora_[AB])\.weight$")
_ENCODER = re.compile(r"\.layers\.(\d+)\.thought_encoder\.pte_encoder\.(?:default\.)?(\w+)\.weight$")


class AdapterTensor(NamedTuple):
    """An adapter tensor's place: a linear's `lora_A` or `lora_B`, or (linear None) a matrix of the encoder."""

    layer: int
    linear: str | None
    matrix: str


def adapter_tensor(name: str) -> AdapterTensor | None:
    """Where an adapter tensor goes; None for a base weight. Raises ValueError for a name that is neither."""
    if match := _LINEAR.search(name):
        return AdapterTensor(int(match[1]), match[2], match[3])
    if match := _ENCODER.search(name):
        return AdapterTensor(int(match[1]), None, match[2])
    if "pte_" in name:
        raise ValueError(f"load_weights: {name!r} is not a name PTE gives to an adapter's tensor")
    return None


def base_name(name: str) -> str:
    """The base checkpoint's name of a base weight."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
