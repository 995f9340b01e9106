"""vLLM's entry point (group ``vllm.general_plugins``): registers the PTE models and the KV cache spec.

vLLM calls `register` in its API, engine and worker processes. Nothing else of vLLM is imported before that. In a
version PTE was not tested with, vLLM itself goes on working: only the PTE models refuse to load, with the reason.
"""

from verl_pte.vllm.architectures import ARCHITECTURES
from verl_pte.vllm.version import supported_version


def register() -> None:
    """Make the PTE architectures known to vLLM; does nothing the second time."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES.values():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"verl_pte.vllm.models:{architecture}")
    if supported_version():
        import verl_pte.vllm.kv_cache  # noqa: F401  registers the spec
