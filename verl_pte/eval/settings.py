"""Settings of an evaluation: what is run, on how many samples, over which windows and budgets.

Left out: what depends on files (the data, the adapter's tensors): the command adds their digests to the identity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from verl_pte.eval.pass_at_k import powers_of_two

# `k` only says what is computed from the items.
_MAY_CHANGE = ("k",)


@dataclass(frozen=True)
class EvaluateSettings:
    """One evaluation. Raises ValueError naming the option, its value and what would be right.

    Attributes:
        model: base model, a directory or a hub id.
        adapter: folder of a saved adapter, or None.
        baseline: `window` or `full`: the base alone, under the window or with its full cache; None with the adapter.
        engine: `native` or `vllm`.
        window: windows to go through, None among them for the full cache.
        max_tokens: budgets to go through, in tokens of the response.
        n: samples a row.
        k: of pass@k; empty is 1, 2, 4, ... and n.
        temperature, top_p, top_k: of the sampling; temperature 0 is greedy.
        seed: of the sampling.
        dtype: as the engine takes it.
        reward: ``path.py:function``, or None for the math grader.
        text: whether responses are kept.
    """

    model: str
    adapter: str | None
    baseline: str | None
    engine: str
    window: tuple[int | None, ...]
    max_tokens: tuple[int, ...]
    n: int = 1
    k: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    dtype: str = "auto"
    reward: str | None = None
    text: bool = True

    def __post_init__(self) -> None:
        self._require("n", self.n >= 1, "must be at least 1")
        self._require("temperature", 0 <= self.temperature < math.inf, "must be >= 0 (0 is greedy)")
        self._require("top_p", 0 < self.top_p <= 1, "must be in (0, 1]")
        self._require("top_k", self.top_k >= 0, "must be positive, or 0 for all tokens")
        self._require("n", self.n == 1 or self.temperature > 0, "with --temperature 0 all samples are the same; use 1")
        for name in ("window", "max_tokens", "k"):
            values = _texts(getattr(self, name))
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"{option(name)}: {value} is there twice")
        for k in self.k:
            if not 1 <= k <= self.n:
                raise ValueError(f"--k {k}: must be in [1, --n {self.n}]: pass@k needs at least k samples a row")

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k, 1 among them."""
        return tuple(sorted({1, *(self.k or powers_of_two(self.n))}))

    def identity(self, **digests: Any) -> dict[str, Any]:
        """What makes two runs the same run, by option; plain values, as JSON keeps them."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _MAY_CHANGE}
        if Path(self.model).is_dir():
            out["model"] = str(Path(self.model).resolve())
        for name in ("window", "max_tokens"):  # as they are given
            out[name] = ",".join(_texts(out[name]))
        return out | digests

    def _require(self, name: str, right: bool, what: str) -> None:
        if not right:
            raise ValueError(f"{option(name)} {getattr(self, name)}: {what}")


def _texts(values: Sequence[int | None]) -> list[str]:
    return ["full" if value is None else str(value) for value in values]


def option(name: str) -> str:
    """How a setting is spelled on the command line."""
    if name in ("evict_fraction", "block_size"):
        return f"{name} of --adapter:"
    return f"--{name.replace('_', '-')}"


def parse_counts(name: str, given: Sequence[str]) -> tuple[int, ...]:
    """The numbers of an option that is repeated, takes lists with commas, or both. Raises ValueError below 1."""
    texts = [text.strip() for value in given for text in value.split(",")]
    for text in texts:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{option(name)} {text}: must be a number from 1 on, or several with commas between")
    return tuple(int(text) for text in texts)


def parse_windows(given: Sequence[str]) -> tuple[int | None, ...]:
    """The windows of ``--window``; ``0`` and ``full`` are None."""
    texts = [text.strip() for value in given for text in value.split(",")]
    return tuple(None if text in ("0", "full") else parse_counts("window", [text])[0] for text in texts)
