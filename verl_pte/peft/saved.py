"""Models on disk: what a base model's and an adapter's folders hold, read before anything heavy is loaded.

For programs that are given paths (the command line, the vLLM engine, a training run that starts from an adapter).
Wrong paths and foreign adapters end here, with what would be right. Left out: saving, which is PEFT's
``save_pretrained``.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from verl_pte.config import PTEConfig
from verl_pte.peft.model import attach, check_architecture, pte_config

WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = ("adapter_config.json", WEIGHTS)
ADAPTER_FOLDER = "pte_adapter"  # beside an actor's other files in a verl checkpoint
# Settings of a run rather than of what was learned: an adapter may be used, and trained on, under others of these.
RUN_SETTINGS = ("window", "evict_fraction", "block_size", "gradient", "kv_store", "chunk_tokens", "reference_cache")


def saved_config(adapter: str) -> PTEConfig:
    """The settings an adapter was saved with. Raises ValueError unless `adapter` is the folder of a PTE adapter."""
    folder = Path(adapter)
    if not folder.is_dir():
        raise ValueError(f"adapter={adapter}: no such directory")
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise ValueError(
                f"adapter={adapter}: has no {name}; give the folder that model.save_pretrained(DIR) wrote, or "
                f"actor/{ADAPTER_FOLDER} of a verl checkpoint"
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


def load_tokenizer(model: str) -> Any:
    """A base model's tokenizer. Raises ValueError if there is none."""
    logging.disable_progress_bar()
    try:
        return AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"model={model}: has no tokenizer ({str(error).splitlines()[0]})") from error


def load(model: str, adapter: str | None, pte: PTEConfig, dtype: torch.dtype | str = "auto") -> PeftModel:
    """The base model with the saved adapter under settings `pte`; without an adapter, with an untrained one."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return attach(base, pte) if adapter is None else PeftModel.from_pretrained(base, adapter, config=pte)


def check_fits(adapter: str, model: PeftModel) -> None:
    """Raise ValueError unless the saved adapter can stand in for that of the attached `model`, on any device.

    Settings that shape the adapter's tensors or what is computed with them must be the model's; RUN_SETTINGS may
    differ. So must the tensors' names and shapes, which another base model's are not.
    """
    saved, own = saved_config(adapter), pte_config(model)
    found, wanted = saved_shapes(adapter), own_shapes(model)
    # PEFT writes `all-linear` out as every module's full name: what was adapted can be compared, how it was said not.
    settings = {"target_modules": (adapted_kinds(found), adapted_kinds(wanted))}
    for key, _, _ in PTEConfig.knobs():
        there, here = settings.get(key, (getattr(saved, key), getattr(own, key)))
        if key not in RUN_SETTINGS and there != here:
            raise ValueError(
                f"adapter={adapter}: was trained with {key}={there!r}, the model has {key}={here!r}: they must agree"
            )
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"adapter={adapter}: was trained on another base model: its {name!r} is {found.get(name, 'missing')}, "
                f"this model's {wanted.get(name, 'missing')}"
            )


def saved_shapes(adapter: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in an adapter's folder, by the name it has there."""
    with safe_open(Path(adapter) / WEIGHTS, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict


def own_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that saving the attached `model` would write, by the name it would have there."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def names_by_key(model: PeftModel, names: Sequence[str]) -> dict[str, str]:
    """Under which key PEFT saves each of these adapter tensors of `model`: their names, by key.

    PEFT drops the adapter's own name from what it saves; it is asked rather than imitated.
    """
    numbered = {name: torch.tensor(index) for index, name in enumerate(names)}
    keys = get_peft_model_state_dict(model, state_dict=numbered, save_embedding_layers=False)
    return {key: names[int(index)] for key, index in keys.items()}


def adapter_digest(adapter: str) -> str:
    """Says whether two folders, or one at two times, hold the same tensors."""
    with (Path(adapter) / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def adapted_kinds(names: Iterable[str]) -> list[str]:
    """Names of the linears that adapter tensors belong to, without their layers: ``down_proj``, ..."""
    modules = {name.partition(".pte_adapter.")[0] for name in names if ".pte_adapter." in name}
    return sorted({module.rpartition(".")[2] for module in modules})
