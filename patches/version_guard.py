"""The guard every patch starts with: refuse outside the versions it was read and tested against."""

from importlib.metadata import version

from packaging.version import Version


def require(package: str, tested: str, purpose: str) -> None:
    """Raise RuntimeError unless `package` has exactly the `tested` version; `purpose` says what the patch is for."""
    found = version(package)
    if Version(found).public != Version(tested).public:
        raise RuntimeError(
            f"verl_pte patches {package} {tested} {purpose}, and found {package} {found}. "
            f"Install the tested version: pip install '{package}=={tested}'"
        )
