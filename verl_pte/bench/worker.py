"""A method's own process and the parent's handle on it: methods can take turns, and peaks of memory are their own.

    parent -> worker   {"settings": ..., "method": ..., "models": ...}, then {"length": 512}, ...
    worker -> parent   {"device": ...} when it is ready, then a sample for each length

One JSON object a line, over the worker's stdin and stdout. What libraries print goes to the worker's log.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TextIO

import torch

from verl_pte.bench.settings import Settings

# One process, quiet, nothing looked up or sent. The block pool is sized in blocks (engines.py), whatever its GiB here.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
LOG_TAIL = 15  # lines of its log a failure shows


class Worker:
    """A method's process, which starts at once; `ready` waits for it.

    Attributes:
        name: of its log.
        program: the module it runs.
    """

    name: ClassVar[str] = "worker"
    program: ClassVar[str] = "verl_pte.bench.worker"

    def __init__(self, settings: Settings, method: str, models: Path, log: Path) -> None:
        self.settings, self.method, self.log = settings, method, log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(settings.threads)},
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._send({"settings": dataclasses.asdict(settings), "method": method, "models": str(models)})

    def ready(self) -> dict[str, Any]:
        """Wait until the engine is up; says where it runs. Raises RuntimeError if it did not start."""
        return self._receive()

    def measure(self, length: int) -> dict[str, Any]:
        """One sample. Raises RuntimeError if the process died."""
        self._send({"length": length})
        return self._receive()

    def close(self) -> None:
        """End the process, by force if it does not go."""
        with contextlib.suppress(BrokenPipeError):
            self._to.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._from.close()

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the log says why, once an answer is missing
            print(json.dumps(message), file=self._to, flush=True)

    def _receive(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            status, tail = self._process.wait(), self.log.read_text().splitlines()[-LOG_TAIL:]
            raise RuntimeError(
                f"the process of {self.method} ended with status {status}; {self.log} ends with\n" + "\n".join(tail)
            )
        return json.loads(line)


class RolloutWorker(Worker):
    """A worker that rolls out, and did what it was asked to."""

    def measure(self, length: int) -> dict[str, Any]:
        """One sample. Raises RuntimeError if the process died, or did something else."""
        sample = super().measure(length)
        asked, bound = self.settings.num_seqs * length, self.settings.most_tokens(self.method, length)
        if sample["tokens"] != asked or sample["peak_cache_tokens"] > bound or sample["preemptions"]:
            raise RuntimeError(
                f"{self.method}: {sample['tokens']} tokens generated of {asked}, {sample['peak_cache_tokens']} held at "
                f"once of {bound} allowed, {sample['preemptions']} preemptions: not what was to be measured"
            )
        return sample


def peak_memory() -> int | None:
    """Most bytes this process had resident since `reset_peaks` (Linux's VmHWM); None where the system does not tell.

    `getrusage` would count what the parent had resident when it started this process.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def reset_peaks() -> None:
    """From here on peaks are counted anew, from what is in use now."""
    with contextlib.suppress(OSError):  # no Linux: the peak stays that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def serve(answers: TextIO) -> None:
    """The worker's side."""
    job = json.loads(sys.stdin.readline())
    settings = Settings(**job["settings"] | {"lengths": tuple(job["settings"]["lengths"])})
    from verl_pte.bench.engines import make_engine

    engine = make_engine(settings, job["method"], Path(job["models"]))
    print(json.dumps({"device": engine.device, "threads": torch.get_num_threads()}), file=answers, flush=True)
    for line in sys.stdin:
        length = json.loads(line)["length"]
        reset_peaks()
        engine.prepare(length)
        load, cpu, start = os.getloadavg()[0], time.process_time(), time.perf_counter()
        held = engine.generate(length)
        sample = {
            "length": length,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,  # of all threads
            "tokens": sum(h.tokens for h in held),
            "evictions": max(h.evictions for h in held),
            "peak_cache_tokens": max(h.peak_tokens for h in held),
            "peak_cache_blocks": max((h.peak_blocks for h in held if h.peak_blocks is not None), default=None),
            "held_bytes": max(h.bytes for h in held),
            "preemptions": sum(h.preemptions for h in held),
            "allocated_bytes": engine.allocated,
            "peak_memory": peak_memory(),
            "peak_gpu_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "load_average": load,
        }
        print(json.dumps(sample), file=answers, flush=True)


def run(serve: Callable[[TextIO], None]) -> None:
    """A worker program's main: answers go to its stdout, what else is printed to its stderr."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(channel)


if __name__ == "__main__":
    run(serve)
