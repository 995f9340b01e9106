"""The exported folder: adapter_config.json, tensors and model card, there whole or not at all."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from verl_pte.export.card import card
from verl_pte.export.source import Source
from verl_pte.peft.saved import ADAPTER_FILES, WEIGHTS, adapted_kinds, saved_config

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Export:
    """What is to be written. Raises ValueError naming the option, its value and what would be right.

    Attributes:
        source: the adapter.
        output: folder to write, a new or an empty one.
        base: how others call the base model; None is the name in the checkpoint, unless that is a path.
        dtype: of the tensors.
    """

    source: Source
    output: Path
    base: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype}: must be one of {', '.join(DTYPES)}")
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise ValueError(f"--output {self.output}: is there already; give a new or an empty folder")
        self.base_name()

    def model(self) -> str:
        """Where the base model's config.json is, by what the checkpoint says."""
        found = self.source.model or self._saved_base()
        if not found:
            raise ValueError("--model is missing: the checkpoint does not say what its base model is")
        return str(found)

    def base_name(self) -> str:
        """The base model's name for others."""
        name = self.base or self._saved_base()
        if not name:
            raise ValueError("--base NAME is missing: the checkpoint does not say what its base model is called")
        if self.base is None and (name.startswith((".", "~")) or Path(name).is_absolute() or Path(name).is_dir()):
            raise ValueError(
                f"--base NAME is missing: the checkpoint knows its base model by a path of this machine, {name}; give "
                "the name others load it by, e.g. Qwen/Qwen2.5-3B-Instruct"
            )
        return name

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write the folder with these tensors, which `check` has found right."""
        adapter, base = self.source.adapter, self.base_name()
        unfinished = self.output.with_name(self.output.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        # The checkpoint's own file with the base's name changed: settings and versions stay as they were saved.
        config = json.loads((adapter / ADAPTER_FILES[0]).read_text())
        config |= {"base_model_name_or_path": base, "inference_mode": True}
        (unfinished / ADAPTER_FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        dtype = getattr(torch, self.dtype)
        save_file({n: t.to(dtype) for n, t in tensors.items()}, unfinished / WEIGHTS, metadata={"format": "pt"})
        text = card(
            base,
            saved_config(str(adapter)),
            modules=adapted_kinds(tensors),
            training=self.source.training,
            dtype=self.dtype,
        )
        (unfinished / "README.md").write_text(text)
        os.replace(unfinished, self.output)  # takes the place of an empty folder

    def _saved_base(self) -> str | None:
        return saved_config(str(self.source.adapter)).base_model_name_or_path
