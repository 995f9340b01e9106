"""Registration with verl: what the ``verl.plugins`` entry point loads in every process that imports verl.

Kept tiny on purpose: it registers the CPU platform and applies the runtime patches, and imports neither an engine nor
a model library. The rollout, the training engines and the agent loop register when a ``PTEModelConfig`` is built
(components.py).

verl swallows what goes wrong here, at DEBUG. An unrelated verl run should indeed not suffer from a broken plugin, but
a PTE run must not start half registered: the failure is kept in ``failure``, and building a ``PTEModelConfig`` raises
it.
"""

from typing import Any

failure: Exception | None = None


def register() -> None:
    """Register what verl needs to know before it starts."""
    from verl_pte.patches import gloo_process_group, metric_names, validate_config
    from verl_pte.verl import components, cpu_platform

    validate_config.apply(mentions=components.mentions_pte, check_run=_check_run)
    metric_names.apply(_fold)
    if cpu_platform.register():
        gloo_process_group.apply()


def _check_run(config: Any) -> None:
    from verl_pte.verl.checks import check_run  # needs transformers and the model code

    check_run(config)


def _fold(key: str, values: Any) -> float:
    from verl_pte.verl.metrics import fold

    return fold(key, values)


try:
    register()
except Exception as error:  # kept and raised later, see above
    failure = error
