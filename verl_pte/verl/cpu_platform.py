"""verl's hardware platform "cpu": lets the stock trainer run where there is no accelerator.

Registered when VERL_PLATFORM=cpu asks for it, and by itself on a machine without accelerators that is not part of a Ray
cluster: the head of a cluster often has none, and its runs are on the accelerators of other machines. verl counts
trainer processes as Ray resources named GPU or NPU, so this platform calls its slots "GPU": a CPU run declares as many
as it wants processes, with ``ray_kwargs.ray_init.num_gpus``.

Left out: profiling, memory counters of a device, IPC. All answer as if there were nothing to count.
"""

import glob
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

# Device files of NVIDIA, AMD and Ascend accelerators. Asking torch is not enough: a Ray actor without a GPU of its
# own sees none on a machine that has eight.
_ACCELERATOR_FILES = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/davinci[0-9]*")


class _CpuDeviceModule(types.ModuleType):
    """What ``torch.cuda`` is to verl's CUDA platform: ``torch.cpu``, and zero for every counter it does not have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name, _zero)

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_device_name(self, *_: Any) -> str:
        return "CPU"


def _zero(*_: Any, **__: Any) -> int:
    return 0


_DEVICE_MODULE = _CpuDeviceModule("verl_pte.cpu_device")


class PlatformCPU(PlatformBase):
    """Platform of a machine without accelerators; gloo connects its processes."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return not accelerator_present()

    def current_device(self) -> Any:
        return torch.device("cpu")  # verl passes it to Tensor.to, where an index would mean a CUDA device

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def accelerator_present() -> bool:
    """Whether this machine (not only this process) has an accelerator."""
    return torch.cuda.is_available() or any(glob.glob(pattern) for pattern in _ACCELERATOR_FILES)


def register() -> bool:
    """Register the platform if it is asked for or there is no other; returns whether it was."""
    asked = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if asked != "cpu" and (asked or accelerator_present() or _in_a_cluster()):
        return False
    os.environ["VERL_PLATFORM"] = "cpu"  # of the Ray workers that this process will start
    PlatformRegistry.register(platform="cpu")(PlatformCPU)
    return True


def _in_a_cluster() -> bool:
    """Whether Ray would join a running cluster, or this is one of its workers, rather than start Ray here."""
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto":
        return address != "local"
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return os.path.exists(os.path.join(folder, "ray", "ray_current_cluster"))
