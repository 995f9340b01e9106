"""Checks a PTE run's whole configuration in the driver, before Ray starts anything.

Why: verl's trainer validates its composed config in ``verl.utils.config.validate_config`` and gives a plugin no say
in it. The dataclasses a plugin can supply see one block each and are built minutes later, in workers; what has to be
checked for PTE lies between blocks (prompt plus response against the model's positions, the rollout's name against
the model's type).

Guard: verl 0.9.1 exactly. Configs that mention PTE nowhere are passed on untouched.
Retire when: verl offers a validation hook to plugins.
"""

import functools
from collections.abc import Callable
from typing import Any

from verl_pte.patches.version_guard import require


def apply(*, mentions: Callable[[Any], bool], check_run: Callable[[Any], None]) -> None:
    """Run `check_run` ahead of verl's own checks on a config that `mentions` PTE; does nothing the second time."""
    from verl.utils import config as verl_config

    original = verl_config.validate_config
    if getattr(original, "patched_by_verl_pte", False):
        return
    require("verl", "0.9.1", "so that configuration errors appear before anything starts")

    @functools.wraps(original)
    def validate_config(config: Any, *args: Any, **kwargs: Any) -> None:
        if mentions(config):
            check_run(config)
        original(config, *args, **kwargs)

    validate_config.__dict__["patched_by_verl_pte"] = True
    verl_config.validate_config = validate_config
