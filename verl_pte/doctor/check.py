"""A finding of the doctor."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How it is."""

    ok = "ok"
    warning = "warning"
    problem = "problem"


class Part(StrEnum):
    """What of the package a check is about."""

    core = "core"  # method, PEFT tuner, native engine, learner; always needed
    verl = "verl"  # training with verl
    vllm = "vllm"  # rollouts and serving on vLLM
    extra = "extra"  # conveniences


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        part: what it is about.
        state: a problem keeps the part from working.
        found: what is there.
        advice: what to do; empty if nothing.
    """

    name: str
    part: Part
    state: State
    found: str
    advice: str = ""

    def judged(self, needed: Collection[Part]) -> "Check":
        """As it counts where only the `needed` parts have to work: elsewhere a problem is a warning."""
        if self.state is State.problem and self.part is not Part.core and self.part not in needed:
            return Check(self.name, self.part, State.warning, self.found, self.advice)
        return self
