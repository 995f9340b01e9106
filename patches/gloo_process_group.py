"""verl's process group on a CPU: plain gloo.

Why: ``verl.utils.distributed.initialize_global_process_group_ray`` names the backend ``cpu:gloo,<device>:<backend>``,
on a CPU ``cpu:gloo,cpu:gloo``, and torch refuses a device named twice. The function takes a backend, but its caller
passes none.

Guard: verl 0.9.1 exactly. Applied only with the CPU platform.
Retire when: verl builds that string without repeating the device, or its CPU platform exists upstream.
"""

import functools
from typing import Any

from verl_pte.patches.version_guard import require


def apply() -> None:
    """Let the backend default to gloo where the device is a CPU; does nothing the second time."""
    from verl.utils import distributed
    from verl.utils.device import get_device_name

    original = distributed.initialize_global_process_group_ray
    if getattr(original, "patched_by_verl_pte", False):
        return
    require("verl", "0.9.1", "so that its process group starts on a CPU")

    @functools.wraps(original)
    def initialize(timeout_second: int | None = None, backend: str | None = None) -> Any:
        if backend is None and get_device_name() == "cpu":
            backend = "gloo"
        return original(timeout_second=timeout_second, backend=backend)

    initialize.__dict__["patched_by_verl_pte"] = True
    distributed.initialize_global_process_group_ray = initialize
