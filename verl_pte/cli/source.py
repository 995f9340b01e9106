"""What a command runs: base model, adapter, window and engine as named on the command line, checked and loaded.

Shared by serve, generate and evaluate. Importing it loads typer alone.
"""

import os
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from verl_pte.cli.errors import fail

if TYPE_CHECKING:
    from peft import PeftModel

    from verl_pte.config import PTEConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")


class EngineName(StrEnum):
    """Which engine generates."""

    native = "native"
    vllm = "vllm"


Model = Annotated[str, typer.Option(help="Base model: a directory, or a hub id.")]
Adapter = Annotated[
    str | None,
    typer.Option(help="Folder of a saved PTE adapter; of a verl checkpoint, actor/pte_adapter.", show_default="none"),
]
WhichEngine = Annotated[EngineName, typer.Option(help="What runs the model; vllm needs verl-pte's extra of that name.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; vLLM's auto is never float32.")]
Options = Annotated[
    list[str] | None, typer.Argument(metavar="-- VLLM_OPTIONS", help="Any options of vllm serve, behind a --.")
]


class Source(NamedTuple):
    """What is to be run.

    Attributes:
        window: replaces the adapter's; 0 is a full cache.
        untouched: run the base alone, an adapter only says when tokens are evicted.
    """

    model: str
    adapter: str | None
    window: int | None
    untouched: bool = False

    def settings(self) -> "PTEConfig":
        """The adapter's settings, or those of the untouched base; under another window if asked."""
        from verl_pte.config import PTEConfig
        from verl_pte.peft.saved import base_config, saved_config

        if self.adapter is None and self.window is None:
            raise ValueError(
                "--adapter DIR is missing; for the base model alone give --window N, the thought tokens its cache holds"
            )
        base_config(self.model)
        # For the base the smallest adapter there is: untrained it does nothing.
        pte = PTEConfig(rank=1, freeze_state=True)
        if self.adapter is not None:
            saved = saved_config(self.adapter)
            if self.untouched:
                pte.window, pte.evict_fraction, pte.block_size = saved.window, saved.evict_fraction, saved.block_size
            else:
                pte = saved
        if self.window is not None:
            pte.window = self.window or None
            pte.schedule()  # checks it
        return pte

    @property
    def weights(self) -> str | None:
        """The adapter whose tensors are used."""
        return None if self.untouched else self.adapter

    def load(self, dtype: str) -> "PeftModel":
        """The model in memory, on the GPU if there is one."""
        import torch

        from verl_pte.peft.saved import load

        check_dtype(dtype)
        model = load(self.model, self.weights, self.settings(), dtype)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")


def check_dtype(dtype: str) -> None:
    """Raise ValueError for one that is none."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}")


def check_options(engine: EngineName, options: Sequence[str] | None) -> None:
    """Raise ValueError for vLLM's options without vLLM."""
    if engine is EngineName.native and options:
        raise ValueError(f"{options[0]}: vLLM's options need --engine vllm")


def vllm_arguments(
    source: Source, max_prompt_length: int | None, named: dict[str, Any], options: Sequence[str] | None
) -> Any:
    """vLLM's arguments: PTE's, those with a name here, and the user's own, which come last and win."""
    from verl_pte.vllm import engine_args
    from verl_pte.vllm.version import require_version

    try:
        require_version()
    except RuntimeError as error:
        fail(error, 1)
    pte = source.settings()
    ours = engine_args(source.model, pte=pte, adapter=source.weights, max_prompt_length=max_prompt_length)
    from verl_pte.vllm.options import parse

    given = [f"--{name}={value}" for name, value in named.items() if value is not None]
    return parse(ours, [*given, *(options or ())])


def quiet_vllm() -> None:
    """Let vLLM, inside a command that shows something else, speak of errors only, and not on standard output."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
