"""Self-distillation: the base model with its full cache teaches the bounded policy, without labels.

`SelfDistillation` is one batch of it; the rest of the package is ``verl-pte warm-start``, a whole run.
"""

from verl_pte.distill.step import DistillResult, SelfDistillation

__all__ = ["DistillResult", "SelfDistillation"]
