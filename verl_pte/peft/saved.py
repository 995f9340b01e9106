"""Models on disk: what a base model's and an adapter's folders hold, read before anything heavy is loaded.

For programs that are given paths (the command line, the vLLM engine). Wrong paths and foreign adapters end here, with
what would be right. Left out: saving, which is PEFT's ``save_pretrained``.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from verl_pte.config import PTEConfig
from verl_pte.peft.model import attach, check_architecture

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def saved_config(adapter: str) -> PTEConfig:
    """The settings an adapter was saved with. Raises ValueError unless `adapter` is the folder of a PTE adapter."""
    folder = Path(adapter)
    if not folder.is_dir():
        raise ValueError(f"adapter={adapter}: no such directory")
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise ValueError(
                f"adapter={adapter}: has no {name}; give the folder that model.save_pretrained(DIR) wrote, or "
                "actor/pte_adapter of a verl checkpoint"
            )
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (KeyError, TypeError) as error:
        raise ValueError(f"adapter={adapter}: its adapter_config.json cannot be read ({error!r})") from error
    if not isinstance(config, PTEConfig):
        raise ValueError(f"adapter={adapter}: holds a {config.peft_type.value} adapter, not a PTE one")
    return config


def base_config(model: str) -> Any:
    """The transformers config of a base model. Raises ValueError if there is no such model or PTE cannot run it."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model={model}: the directory has no config.json")
    elif model.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2:
        raise ValueError(f"model={model}: no such directory")
    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model={model}: no such directory, and the hub does not give it ({reason})") from error
    check_architecture(config)
    return config


def load(model: str, adapter: str | None, pte: PTEConfig, dtype: torch.dtype | str = "auto") -> PeftModel:
    """The base model with the saved adapter under settings `pte`; without an adapter, with an untrained one."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return attach(base, pte) if adapter is None else PeftModel.from_pretrained(base, adapter, config=pte)
