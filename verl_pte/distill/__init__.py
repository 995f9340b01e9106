"""Self-distillation: the base model with its full cache teaches the bounded policy, without labels."""

from verl_pte.distill.step import DistillResult, SelfDistillation

__all__ = ["DistillResult", "SelfDistillation"]
