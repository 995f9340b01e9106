"""The PEFT tuner: attach, save, load and disable PTE adapters as PEFT does LoRA's.

Importing this package registers the method with PEFT, after which ``get_peft_model`` and
``PeftModel.from_pretrained`` know it.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from verl_pte.config import PTEConfig
from verl_pte.peft.model import (
    PTEModel,
    attach,
    head_dim,
    pte_config,
    pte_tuner,
    refresh_shared_inputs,
    thought_encoders,
)

if PeftType("PTE") not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="pte", config_cls=PTEConfig, model_cls=PTEModel, prefix=PTEModel.prefix)

__all__ = [
    "PTEModel",
    "attach",
    "head_dim",
    "pte_config",
    "pte_tuner",
    "refresh_shared_inputs",
    "thought_encoders",
]
