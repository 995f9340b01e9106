"""Registration with verl: what the ``verl.plugins`` entry point loads in every process that imports verl.

Kept tiny on purpose: it registers the CPU platform and applies the runtime patches, and imports neither an engine nor
a model library. The rollout, the training engines and the agent loop register when a ``PTEModelConfig`` is built
(components.py).

verl swallows what goes wrong here, at DEBUG. An unrelated verl run should indeed not suffer from a broken plugin, but
a PTE run must not start half registered: the failure is kept in ``failure``, and building a ``PTEModelConfig`` raises
it.
"""

failure: Exception | None = None


def register() -> None:
    """Register what verl needs to know before it starts."""
    from verl_pte.patches import gloo_process_group, metric_names, validate_config
    from verl_pte.verl import cpu_platform

    validate_config.apply()
    metric_names.apply()
    if cpu_platform.register():
        gloo_process_group.apply()


try:
    register()
except Exception as error:  # kept and raised later, see above
    failure = error
