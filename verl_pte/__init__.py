"""Progressive Thought Encoding for verl: RL of reasoning models under a fixed KV cache.

Public names load on first use, so that importing the package (verl does, in every process) costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "PTEConfig": "verl_pte.config",
    "attach": "verl_pte.peft",
    "RolloutEngine": "verl_pte.engine",
    "RolloutOutput": "verl_pte.engine",
    "SamplingParams": "verl_pte.engine",
    "replay_log_probs": "verl_pte.learner",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'verl_pte' has no attribute {name!r}")
