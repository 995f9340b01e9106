"""Lets metrics of the training engine keep names that start with ``pte/``, and be folded by their own rule.

Why: verl's trainer prefixes everything an actor engine reports with ``actor/`` and averages it over mini-batches
unless the name says max or min. It has no other way to bring a metric from the engine to the logger.
``pte/peak_cache_tokens`` is a maximum.

Guard: verl 0.9.1 exactly. Only keys under ``pte/`` are treated differently. Retire when: verl logs metrics that carry
their own name and aggregation (its ``Metric`` loses the latter over mini-batches).
"""

import functools
from collections.abc import Callable
from typing import Any

from verl_pte.patches.version_guard import require


def apply(fold: Callable[[str, Any], float]) -> None:
    """Wrap ``rename_dict``, which verl's trainers import by name afterwards; does nothing the second time.

    `fold` makes one number for a step of a metric's name and the values its mini-batches reported.
    """
    from verl.utils import py_functional

    original = py_functional.rename_dict
    if getattr(original, "patched_by_verl_pte", False):
        return
    require("verl", "0.9.1", "so that pte/* metrics reach its logger under their names")

    @functools.wraps(original)
    def rename_dict(data: dict, prefix: str = "") -> dict:
        ours = {key: value for key, value in data.items() if key.startswith("pte/")}
        if not ours:
            return original(data, prefix)
        renamed: dict[str, Any] = original({key: value for key, value in data.items() if key not in ours}, prefix)
        renamed.update((key, [fold(key, value)]) for key, value in ours.items())
        return renamed

    rename_dict.__dict__["patched_by_verl_pte"] = True
    py_functional.rename_dict = rename_dict
