"""Probe: verl, this package's plugin in it, and the training engine and rollout that the plugin stands for."""

import importlib
import os
import sys

from verl_pte.doctor.check import Check, Part, State
from verl_pte.doctor.probe import reason, report

# What verl's trainer imports and verl does not declare, and Ray.
_IMPORTED = ("ray", "transfer_queue", "cachetools", "fastapi", "uvicorn")


def imports() -> Check:
    """Whether those can be imported."""
    failed = []
    for name in _IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed.append(reason(error))
    if failed:
        return _problem("verl imports", "; ".join(failed), "pip install 'verl-pte[verl]' installs them")
    return Check("verl imports", Part.verl, State.ok, ", ".join(_IMPORTED))


def plugin() -> Check:
    """Whether `import verl` loads the plugin, and what it says."""
    importlib.import_module("verl")
    from verl_pte.verl.config import require_plugin

    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS")
    try:
        require_plugin()
    except RuntimeError as error:
        plugin = sys.modules.get("verl_pte.verl.plugin")
        if plugin is not None and plugin.failure is not None:
            return _problem("verl plugin", reason(plugin.failure), "a PTE run would stop with this")
        advice = (
            f"verl did not load it: VERL_USE_EXTERNAL_PLUGINS={policy} leaves it out; unset it, or add verl_pte"
            if policy is not None
            else reason(error)
        )
        return _problem("verl plugin", "not loaded", advice)
    return Check("verl plugin", Part.verl, State.ok, "registered; patches apply")


def platform() -> Check:
    """The hardware verl believes to be on."""
    from verl.plugin.platform import get_platform

    from verl_pte.verl.cpu_platform import accelerator_present

    asked = os.environ.get("VERL_PLATFORM")
    try:
        name = get_platform().device_name
    except ValueError as error:
        return _problem("verl platform", f"VERL_PLATFORM={asked}: {error}", "unset VERL_PLATFORM")
    if name == "cpu" and accelerator_present():
        advice = "unset VERL_PLATFORM to train on the accelerator"
        return Check("verl platform", Part.verl, State.warning, f"VERL_PLATFORM={asked} on an accelerator", advice)
    return Check("verl platform", Part.verl, State.ok, name)


def engine() -> Check:
    """Whether training engine and rollout register; loads all they need."""
    from verl.plugin.platform import get_platform

    from verl_pte.verl import components
    from verl_pte.verl.config import MODEL_TYPE

    try:
        components.register()
        from verl.workers.engine import EngineRegistry
        from verl.workers.rollout.replica import RolloutReplicaRegistry

        found = EngineRegistry._engines[MODEL_TYPE]
        device = get_platform().device_name
        strategies = sorted(name for name, by_device in found.items() if device in by_device)
        RolloutReplicaRegistry.get(components.ROLLOUT)
    except Exception as error:
        return _problem("training engine", reason(error), "a PTE run would stop with this")
    if not strategies:
        return _problem("training engine", f"none for verl's platform {device}", "PTE trains on cuda and cpu")
    return Check("training engine", Part.verl, State.ok, f"{', '.join(strategies)} on {device}; rollout pte")


def _problem(name: str, found: str, advice: str) -> Check:
    return Check(name, Part.verl, State.problem, found, advice)


def main() -> None:
    """All of it; the engine only where it can work."""
    report(imports())
    for examine in (plugin, platform, engine):
        check = examine()
        report(check)
        if check.state is State.problem:
            return


if __name__ == "__main__":
    main()
