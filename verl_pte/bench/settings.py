"""What a rollout benchmark runs: three methods, and the sizes, lengths and repeats they share.

Left out: how it is run (rollout.py) and what is made of the samples (report.py).
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

from verl_pte.config import PTEConfig
from verl_pte.core.attention import BACKENDS
from verl_pte.plan.configs import check_model
from verl_pte.vllm.version import supported_version

ENGINES = ("vllm", "native")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
HEAD_DIM = 64  # of the random model; vLLM's CPU attention has kernels for it


class Method(NamedTuple):
    """A title, and the PTE settings that differ from a run's own."""

    title: str
    knobs: dict[str, Any]


# In the order in which they take turns.
METHODS = {
    "full": Method("full cache", {"window": None, "freeze_state": True}),
    "lora_c": Method("LoRA_c", {"freeze_state": True}),
    "pte": Method("PTE", {}),
}
BASELINE = "lora_c"  # what times are compared with: the same window, without thought states


@dataclass(frozen=True)
class Settings:
    """One run. Raises ValueError naming the option, its value and what would be right.

    Attributes:
        engine: `vllm` or `native`; see `default_engine`.
        lengths: tokens generated for each sequence, one measurement each.
        window: W of LoRA_c and PTE, in tokens.
        num_seqs: sequences decoded at once.
        prompt_length: of every sequence.
        rank: of the adapter.
        hidden_size, layers: of the random Qwen2, whose other sizes follow; not looked at with `model`.
        model: a name of configs.py, or a transformers config.json or its folder, to take all sizes from instead.
        dtype: of weights and cache.
        device: where the native engine runs; vLLM runs where its build does.
        attention: of the models, as transformers names it (core/attention.py), the full cache's too; vLLM has its own.
        threads: of each method's process, on CPUs.
        eager: vLLM without torch.compile and CUDA graphs. The native engine is not compiled here either way.
        repeats: measurements of each method and length.
        seed: of weights and prompts.
        equal_memory: also measure as many sequences of each method as fit into one cache budget (equal_memory.py).
        budget_mib: that budget; None is what the full cache takes for num_seqs sequences at the longest length.
    """

    engine: str = "vllm"
    lengths: tuple[int, ...] = (512, 1024, 2048)
    window: int = 256
    num_seqs: int = 8
    prompt_length: int = 64
    rank: int = 32
    hidden_size: int = 512
    layers: int = 8
    model: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    attention: str = "sdpa"
    threads: int = 1
    eager: bool = False
    repeats: int = 5
    seed: int = 0
    equal_memory: bool = False
    budget_mib: float | None = None

    def __post_init__(self) -> None:
        choices = (("engine", ENGINES), ("dtype", DTYPES), ("device", DEVICES), ("attention", BACKENDS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)}: must be one of {', '.join(allowed)}")
        lengths = ",".join(map(str, self.lengths))
        if not self.lengths or any(length < 1 for length in self.lengths):
            raise ValueError(f"--lengths {lengths}: must be positive numbers of tokens")
        if sorted(set(self.lengths)) != list(self.lengths):
            raise ValueError(f"--lengths {lengths}: must rise, each length is measured once")
        for name in ("num_seqs", "prompt_length", "rank", "hidden_size", "layers", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.hidden_size % HEAD_DIM:
            raise ValueError(f"--hidden-size {self.hidden_size}: must be a multiple of {HEAD_DIM}, the width of a head")
        if self.budget_mib is not None and not self.budget_mib > 0:
            raise ValueError(f"--budget-mib {self.budget_mib}: must be positive")
        if self.engine == "vllm" and self.device != "auto":
            raise ValueError(
                f"--device {self.device}: must be auto with --engine vllm, which runs where its build does"
            )
        if self.engine == "vllm" and self.attention != "sdpa":
            raise ValueError(f"--attention {self.attention}: must be sdpa with --engine vllm, which has its own")
        if self.attention == "flash_attention_2":
            if self.dtype == "float32":
                raise ValueError("--attention flash_attention_2: takes --dtype bfloat16 or float16, not float32")
            if find_spec("flash_attn") is None:
                raise ValueError("--attention flash_attention_2: needs pip install 'verl-pte[flash-attn]'")
        if self.model is not None:
            check_model(self.model)
        self.method("pte")  # checks the window

    def method(self, name: str) -> PTEConfig:
        """The configuration of one of METHODS."""
        knobs = {"window": self.window} | METHODS[name].knobs
        return PTEConfig(rank=self.rank, alpha=float(self.rank), **knobs)

    def most_tokens(self, name: str, length: int) -> int:
        """Most tokens a sequence of a method may hold: prompt and answer, or the schedule's bound if that is less."""
        limit = self.method(name).schedule().cache_limit(self.prompt_length)
        full = self.prompt_length + length
        return full if limit is None else min(full, limit)


def default_engine(device: str, attention: str) -> str:
    """`vllm` where the tested version is installed and may choose device and attention, `native` elsewhere."""
    return "vllm" if device == "auto" and attention == "sdpa" and supported_version() else "native"


# A run that takes seconds, to see that all works. Its times say little: Python takes longer than the arithmetic.
QUICK: dict[str, Any] = {
    "lengths": (32, 64, 128),
    "window": 32,
    "num_seqs": 2,
    "prompt_length": 20,
    "rank": 8,
    "hidden_size": 128,
    "layers": 2,
    "eager": True,
    "repeats": 2,
}
