"""What a run needs of a device's memory, before it runs: ``verl-pte plan``.

The project's own replay and engine run on the meta device, with models that have shapes and no numbers, and the
tensors they hold are counted (live.py). No formula for activations has to be kept up to date.
"""

from verl_pte.plan.estimate import Part, Phase, Plan, PlanSettings, estimate

__all__ = ["Part", "Phase", "Plan", "PlanSettings", "estimate"]
