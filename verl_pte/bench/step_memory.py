"""Peak memory of one step: what a process held before it, and the most it held during it.

On a CUDA device torch's allocator is asked. On CPUs it is resident memory: Linux keeps its peak (VmHWM), which writing
5 to /proc/self/clear_refs starts anew; where that is not permitted a thread looks at resident memory every few
milliseconds, and may miss a short peak.
"""

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_INTERVAL = 0.002  # seconds between the looks of the thread


@dataclass
class StepMemory:
    """Bytes; `how` says how they were found."""

    before: int = 0
    peak: int = 0
    how: str = ""

    @property
    def rise(self) -> int:
        """What the step added at its peak."""
        return self.peak - self.before


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[StepMemory]:
    """Fills in what it yields when the block ends."""
    found = StepMemory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        found.how, found.before = "torch.cuda.max_memory_allocated", torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()  # processes of other methods share the device
        return
    _return_freed_memory()
    try:
        _CLEAR.write_text("5")
        found.how = "VmHWM"
    except OSError:
        found.how = f"VmRSS every {_INTERVAL * 1000:.0f} ms"
    found.before = _resident("VmRSS")
    if found.how == "VmHWM":
        yield found
        found.peak = _resident("VmHWM")
        return
    done, peaks = threading.Event(), [found.before]

    def watch() -> None:
        while not done.wait(_INTERVAL):
            peaks[0] = max(peaks[0], _resident("VmRSS"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
    found.peak = peaks[0]


def _resident(key: str) -> int:
    line = re.search(rf"{key}:\s+(\d+) kB", _STATUS.read_text())
    assert line is not None, f"no {key} in {_STATUS}"
    return int(line[1]) * 1024


def _return_freed_memory() -> None:
    """Or what an earlier step freed would count as held before this one."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
