"""Installed versions against the ones this package declares (pyproject.toml, read back from its installation).

Nothing is imported: whether a package that is there also works, the probes find out.
"""

import platform
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import verl_pte
from verl_pte.doctor.check import Check, Part, State

_DISTRIBUTION = "verl-pte"
_AGAIN = "install again: pip install -e . in its checkout"
_ENTRY_POINTS = {"verl.plugins": Part.verl, "vllm.general_plugins": Part.vllm}
_EXTRAS = {  # (part, what it is for)
    "verl": (Part.verl, "training with verl"),
    "megatron": (Part.extra, "training on Megatron"),
    "eval": (Part.extra, "the math reward"),
    "docs": (Part.extra, "plots and the documentation"),
}


def check_packages() -> list[Check]:
    """Python, this package, what it needs, and what it can use."""
    try:
        distribution = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        found = f"{verl_pte.__version__} runs from {_place()} and is not installed"
        advice = "pip install -e . in its checkout: verl and vLLM find the plugin through the installation"
        return [Check("verl_pte", Part.core, State.problem, found, advice)]
    wanted = [Requirement(text) for text in distribution.requires or []]
    checks = [_python(distribution), _package(distribution)]
    checks += [_entry_point(group, part) for group, part in _ENTRY_POINTS.items()]
    checks.append(_versions("packages", Part.core, [r for r in wanted if r.marker is None], ""))
    for extra, (part, purpose) in _EXTRAS.items():
        own = [r for r in wanted if r.marker is not None and r.marker.evaluate({"extra": extra})]
        checks.append(_versions(f"extra {extra}", part, own, purpose))
    return checks


def _place() -> str:
    return str(Path(verl_pte.__file__).parent)


def _python(distribution: metadata.Distribution) -> Check:
    here, wanted = platform.python_version(), distribution.metadata["Requires-Python"]
    right = SpecifierSet(wanted).contains(here, prereleases=True)
    advice = "" if right else f"needs Python {wanted}"
    return Check("python", Part.core, State.ok if right else State.problem, here, advice)


def _package(distribution: metadata.Distribution) -> Check:
    found = f"{verl_pte.__version__} at {_place()}"
    if distribution.version != verl_pte.__version__:
        found += f"; installed is {distribution.version}"
        return Check("verl_pte", Part.core, State.problem, found, _AGAIN)
    return Check("verl_pte", Part.core, State.ok, found)


def _entry_point(group: str, part: Part) -> Check:
    """How verl and vLLM find the plugin."""
    there = any(entry.name == "verl_pte" for entry in metadata.entry_points(group=group))
    name = f"entry point {group}"
    return Check(name, part, State.ok, "verl_pte") if there else Check(name, part, State.problem, "missing", _AGAIN)


def _versions(name: str, part: Part, wanted: list[Requirement], purpose: str) -> Check:
    found, wrong = [], []
    for requirement in wanted:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(f"no {requirement.name}")
            wrong.append(requirement)
            continue
        if f"{requirement.name} {version}" not in found:
            found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(requirement)
    if not wrong:
        return Check(name, part, State.ok, ", ".join(found))
    advice = "pip install " + " ".join(f"'{r.name}{r.specifier}'" for r in wrong)
    if purpose:
        advice += f" for {purpose}"
    return Check(name, part, State.warning if part is Part.extra else State.problem, ", ".join(found), advice)
