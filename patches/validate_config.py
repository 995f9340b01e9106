"""Checks a PTE run's whole configuration in the driver, before Ray starts anything.

Why: verl's trainer validates its composed config in ``verl.utils.config.validate_config`` and gives a plugin no say
in it. The dataclasses a plugin can supply see one block each and are built minutes later, in workers; what has to be
checked for PTE lies between blocks (prompt plus response against the model's positions, the rollout's name against
the model's type).

Guard: verl 0.9.1 exactly. Configs that mention PTE nowhere are passed on untouched.
Retire when: verl offers a validation hook to plugins.
"""

import functools
from typing import Any

from verl_pte.patches.version_guard import require

from verl_pte.verl.components import mentions_pte


def apply() -> None:
    """Run the PTE checks ahead of verl's own; does nothing the second time."""
    from verl.utils import config as verl_config

    original = verl_config.validate_config
    if hasattr(original, "__wrapped__"):
        return
    require("verl", "0.9.1", "so that configuration errors appear before anything starts")

    @functools.wraps(original)
    def validate_config(config: Any, *args: Any, **kwargs: Any) -> None:
        if mentions_pte(config):
            from verl_pte.verl.checks import check_run

            check_run(config)
        original(config, *args, **kwargs)

    verl_config.validate_config = validate_config
