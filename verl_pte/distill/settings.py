"""Settings of a warm start: what is trained, on what, how long; and which of them a run that goes on may change.

The method's own knobs are PTEConfig's. Left out: what follows from these for each step (plan.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from verl_pte.config import PTEConfig

DTYPES = ("auto", "float32", "bfloat16")
# They move memory and speed, and results by rounding (which may turn a sampled answer): a run may go on under others.
_MAY_CHANGE = ("micro_batch", "max_num_seqs", "save_every", "device", "pte.kv_store", "pte.chunk_tokens")


@dataclass(frozen=True)
class WarmStartSettings:
    """One run. Raises ValueError naming the option, its value and what would be right.

    Attributes:
        model: base model, a directory or a hub id.
        pte: the student's settings, which its adapter keeps.
        steps: optimizer steps.
        batch_size: prompts a step, of all ranks together; one answer each.
        micro_batch: answers replayed at once.
        max_num_seqs: answers generated at once by a rank; None is its whole share of the batch.
        lr, warmup_steps: AdamW's rate rises for so many steps, then falls to 10 % along a cosine.
        grad_norm: gradients are clipped to this norm.
        max_prompt_length, max_response_length: in tokens. Longer prompts are left out, answers cut off.
        temperature, top_p: of the teacher's answers; temperature 0 is greedy. The KL is always at temperature 1.
        seed: of the new adapter, the order of the prompts and the answers.
        dtype: of the base's weights, `auto` is the checkpoint's; the adapter is trained in float32.
        device: `auto` is cuda where there is one.
        save_every: steps between checkpoints.
    """

    model: str
    pte: PTEConfig
    steps: int = 200
    batch_size: int = 32
    micro_batch: int = 4
    max_num_seqs: int | None = None
    lr: float = 1e-4
    warmup_steps: int = 10
    grad_norm: float = 1.0
    max_prompt_length: int = 1024
    max_response_length: int = 3072
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    save_every: int = 10

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "micro_batch", "max_prompt_length", "max_response_length", "save_every")
        for name in (*counts, *(["max_num_seqs"] if self.max_num_seqs is not None else [])):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        self._require("warmup_steps", 0 <= self.warmup_steps < self.steps, f"must be in [0, --steps {self.steps})")
        for name in ("lr", "grad_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "must be a positive number")
        self._require("temperature", 0 <= self.temperature < math.inf, "must be >= 0 (0 is greedy)")
        self._require("top_p", 0 < self.top_p <= 1, "must be in (0, 1]")
        self._require("dtype", self.dtype in DTYPES, f"must be one of {', '.join(DTYPES)}")
        if self.pte.window is None:
            raise ValueError("--pte window=null: must be a number of tokens, a full cache has nothing to be taught")

    def identity(self, prompts: str) -> dict[str, Any]:
        """What makes two runs the same run, by option; plain values, as JSON keeps them. `prompts` is their digest."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pte"}
        out["prompts"] = prompts
        if Path(self.model).is_dir():
            out["model"] = str(Path(self.model).resolve())
        for name, _, _ in PTEConfig.knobs():
            value = getattr(self.pte, name)
            out[f"pte.{name}"] = sorted(value) if isinstance(value, set) else value
        return {name: value for name, value in out.items() if name not in _MAY_CHANGE}

    def _require(self, name: str, right: bool, what: str) -> None:
        if not right:
            raise ValueError(f"{option(name)} {getattr(self, name)}: {what}")


def option(name: str) -> str:
    """How a setting is spelled on the command line."""
    return f"--pte {name.removeprefix('pte.')}" if name.startswith("pte.") else f"--{name.replace('_', '-')}"


def parse_knobs(assignments: Sequence[str]) -> PTEConfig:
    """The PTEConfig of ``["window=1024", "target_modules=[q_proj,v_proj]", ...]``; values are YAML's."""
    known = [name for name, _, _ in PTEConfig.knobs()]
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--pte {assignment}: must be KEY=VALUE, e.g. --pte window=1024")
        if key not in known:
            raise ValueError(f"--pte {assignment}: no such setting; known are {', '.join(known)}")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--pte {assignment}: cannot be read ({str(error).splitlines()[0]})") from None
    try:
        return PTEConfig(**values)
    except ValueError as error:
        raise ValueError(f"--pte {error}") from None
