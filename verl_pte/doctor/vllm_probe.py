"""Probe: vLLM, and this package's models in it."""

import os

from verl_pte.doctor.check import Check, Part, State
from verl_pte.doctor.probe import reason, report
from verl_pte.vllm.version import TESTED, installed_version, require_version


def main() -> None:
    """Version, environment, import."""
    found = installed_version()
    try:
        require_version()
    except RuntimeError as error:
        advice = f"pip install 'verl-pte[vllm]', that is vllm=={TESTED}; without it: rollouts on the native engine"
        report(Check("vllm", Part.vllm, State.problem, found or "not installed", advice if not found else str(error)))
        return
    runner = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0")
    if runner != "0":
        advice = "unset it, PTE extends vLLM's first model runner"
        report(Check("vllm", Part.vllm, State.problem, f"VLLM_USE_V2_MODEL_RUNNER={runner}", advice))
        return
    try:
        from vllm import ModelRegistry

        from verl_pte.vllm.architectures import ARCHITECTURES
        from verl_pte.vllm.plugin import register

        register()
        missing = set(ARCHITECTURES.values()) - set(ModelRegistry.get_supported_archs())
    except Exception as error:
        advice = "vLLM itself cannot be imported here; without it: rollouts on the native engine"
        report(Check("vllm", Part.vllm, State.problem, f"{found}: {reason(error)}", advice))
        return
    if missing:
        report(Check("vllm", Part.vllm, State.problem, f"{found} does not take {', '.join(sorted(missing))}"))
        return
    report(Check("vllm", Part.vllm, State.ok, f"{found}, PTE models registered"))


if __name__ == "__main__":
    main()
