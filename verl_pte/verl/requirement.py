"""The form of a configuration check: a key, the value it must have, and why."""

from collections.abc import Mapping
from typing import Any


def require(block: Any, key: str, right: Any, why: str, prefix: str = "actor_rollout_ref.") -> None:
    """Raise ValueError unless a block's dotted `key` has the value `right`; keys that are not there pass."""
    value: Any = block
    for part in key.split("."):
        if value is None or part not in value:
            return
        value = value[part]
    if value != right:
        raise ValueError(f"{prefix}{key}={value!r}: must be {right!r}, {why}")


def plain(block: Any) -> Any:
    """An omegaconf block as plain dicts and lists."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(block):
        return OmegaConf.to_container(block, resolve=True)
    return dict(block) if isinstance(block, Mapping) else block
