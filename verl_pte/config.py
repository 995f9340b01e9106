"""PTEConfig: every knob of the method, validated once.

A PEFT config, so that ``peft.get_peft_model``, ``save_pretrained`` and ``PeftModel.from_pretrained`` take it as they
take ``LoraConfig``. The same block appears in verl's YAML under ``actor_rollout_ref.model.pte``. Left out: everything
that belongs to a run (lengths, batch sizes, devices) rather than to the method.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig, TaskType
from peft.utils.peft_types import PeftType

from verl_pte.core.schedule import Schedule
from verl_pte.patches import peft_type
from verl_pte.versions import installed

peft_type.apply()

_CHOICES = {
    "normalize": ("row", "frobenius"),
    "attention": ("linear", "softmax"),
    "gradient": ("full", "state", "truncated"),
    "kv_store": ("device", "host"),
    "reference_cache": ("window", "full"),
}


def _knob(default: Any, help: str) -> Any:
    return field(default=default, metadata={"knob": help})


@dataclass
class PTEConfig(PeftConfig):
    """Settings of Progressive Thought Encoding (arXiv 2602.16839).

    Raises ValueError naming the key, its value and what would be right.
    """

    rank: int = _knob(32, "Rank r of the adapter and side of the thought state S (r x r). Paper: 32.")
    alpha: float = _knob(32.0, "LoRA scale: the adapter's output is multiplied by alpha / rank. The paper states none.")
    target_modules: Any = _knob(
        "all-linear",
        "Linear layers to adapt: `all-linear` (every linear of a decoder layer) or a list of names. "
        "The paper states none.",
    )
    num_global_tokens: int = _knob(
        32, "Learned global tokens that make the initial state; 0 starts from a zero state (#Global-0). Paper: 32."
    )
    window: int | None = _knob(
        1024, "Thought tokens W the cache holds beyond the pinned ones, a multiple of `block_size`; null = full cache."
    )
    evict_fraction: float = _knob(
        0.25,
        "Share of the window evicted at once, rounded up to whole blocks; in (0, 1). Paper: 0.25 (0.05 to 0.25 tried).",
    )
    block_size: int = _knob(16, "Cache block in tokens: pinned lengths and evictions are aligned to it.")
    update_strength: float | None = _knob(
        0.3,
        "Norm of each state update relative to the state, before normalising: "
        "S' is rescaled to update_strength * sqrt(rank). "
        "null = the paper's literal sum, which overwrites the memory (docs/deviations.md).",
    )
    update_state: bool = _knob(True, "False keeps the initial state for ever: the paper's Global-Only baseline.")
    freeze_state: bool = _knob(
        False, "True fixes S to the identity and drops the encoder: plain LoRA (LoRA_c under a window)."
    )
    normalize: str = _knob(
        "row", "Normalize of the paper: each `row` of S to norm 1, or S to `frobenius` norm sqrt(rank)."
    )
    attention: str = _knob("linear", "How global queries weigh evicted tokens: `linear` (the paper) or `softmax`.")
    gradient: str = _knob(
        "full",
        "What flows between segments in training: `full` (exact), `state` (keys and values constant), "
        "`truncated` (the state constant too).",
    )
    kv_store: str = _knob("device", "Where the learner keeps every token's keys and values: `device` or `host`.")
    chunk_tokens: int = _knob(
        512, "Most tokens of one sequence run at once by replay and prefill. Moves memory and speed, never results."
    )
    reference_cache: str = _knob(
        "window",
        "Cache of the reference policy (the base without adapter): the same `window`, or `full`, "
        "which makes it a teacher.",
    )
    versions: dict[str, str] | None = None  # of the packages that saved it; no knob, `save_pretrained` fills it in

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("PTE")
        if self.task_type is None:  # type: ignore[has-type]
            self.task_type = TaskType.CAUSAL_LM
        for key in ("rank", "block_size", "chunk_tokens"):
            self._check_int(key, minimum=1)
        self._check_int("num_global_tokens", minimum=0)
        if not _is_positive(self.alpha):
            raise ValueError(f"alpha={self.alpha!r}: must be a positive number, e.g. rank or 2 * rank")
        if self.update_strength is not None and not _is_positive(self.update_strength):
            raise ValueError(
                f"update_strength={self.update_strength!r}: must be a positive number, or null for the "
                "paper's literal update; "
                "to switch updates off set update_state: false"
            )
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r}: must be one of {', '.join(allowed)}")
        for key in ("update_state", "freeze_state"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}={getattr(self, key)!r}: must be true or false")
        self.schedule()  # checks window, evict_fraction and block_size
        if isinstance(self.target_modules, str):
            if self.target_modules != "all-linear":
                raise ValueError(
                    f"target_modules={self.target_modules!r}: must be `all-linear` or a list of module names"
                )
        elif not self.target_modules or not all(isinstance(name, str) for name in self.target_modules):
            raise ValueError(
                f"target_modules={self.target_modules!r}: must be `all-linear` or a list of names, "
                "e.g. [q_proj, v_proj]"
            )
        else:
            self.target_modules = set(self.target_modules)  # what PEFT's matching expects

    def schedule(self) -> Schedule:
        """The eviction schedule these settings stand for."""
        return Schedule(self.window, self.evict_fraction, self.block_size)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does it, with the versions of the packages that save."""
        self.versions = installed()
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def knobs(cls) -> list[tuple[str, Any, str]]:
        """(name, default, description) of every knob of ours, in order; the configuration reference is made from it."""
        return [(f.name, f.default, f.metadata["knob"]) for f in fields(cls) if "knob" in f.metadata]

    def _check_int(self, key: str, minimum: int) -> None:
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{key}={value!r}: must be an integer >= {minimum}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
