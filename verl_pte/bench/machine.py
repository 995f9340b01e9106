"""What a benchmark ran on, and when: processor, memory, day, versions, commit."""

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import verl_pte
from verl_pte.vllm.version import installed_version


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory, and the day and the load of the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def versions() -> dict[str, str | None]:
    """Of Python and of what the numbers depend on."""
    names = ("torch", "transformers", "peft")
    optional = [name for name in ("verl", "flash-attn") if find_spec(name.replace("-", "_"))]
    return {
        "python": platform.python_version(),
        "verl_pte": verl_pte.__version__,
        "vllm": installed_version(),
        **{name: metadata.version(name) for name in (*names, *optional)},
    }


def commit() -> str | None:
    """The commit of the checkout this package is in, with `-dirty` if the package differs from it; None if in none."""
    package = Path(verl_pte.__file__).parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=package, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    changed = git("status", "--porcelain", "--", ".")  # of the package alone: benchmarks write results beside it
    return f"{git('rev-parse', 'HEAD')}{'-dirty' if changed else ''}"
