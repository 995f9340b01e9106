"""Versions of the packages whose code an adapter's numbers depend on: written into every saved adapter."""

from importlib import metadata

import verl_pte

_PACKAGES = ("verl", "transformers", "peft", "torch")


def installed() -> dict[str, str]:
    """Version of this package and of each of those that is installed."""
    found = {"verl_pte": verl_pte.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
