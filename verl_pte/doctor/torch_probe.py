"""Probe: devices, and which attention backends work on them."""

import importlib
import shutil
import subprocess

from verl_pte.doctor.check import Check, Part, State
from verl_pte.doctor.probe import reason, report


def devices() -> Check:
    """GPUs that PyTorch can use, or why it cannot."""
    import torch

    build = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"
    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            names.append(f"{properties.name} {properties.total_memory / 2**30:.0f} GiB")
        bf16 = "" if torch.cuda.is_bf16_supported() else "; no bfloat16"
        return Check("devices", Part.core, State.ok, f"{', '.join(names)}; {build}; driver {_driver()}{bf16}")
    if (driver := _driver()) != "none":
        advice = (
            "install PyTorch's CUDA build" if not torch.version.cuda else "driver too old for it, or no device visible"
        )
        return Check("devices", Part.verl, State.problem, f"driver {driver}, no CUDA in PyTorch; {build}", advice)
    return Check("devices", Part.core, State.warning, f"CPU alone; {build}", "enough for tiny models and the tests")


def _driver() -> str:
    """Version of the NVIDIA driver; `none` if there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else "none"


def attention() -> Check:
    """The backends a model may be loaded with for training here."""
    import torch

    from verl_pte.core.attention import BACKENDS, NEEDS_GPU

    works, not_here = [], []
    for backend in BACKENDS:
        if backend in NEEDS_GPU and not torch.cuda.is_available():
            not_here.append(f"{backend} (needs a GPU)")
        elif backend == "flash_attention_2" and (why := _flash_attn()):
            not_here.append(f"{backend} ({why})")
        else:
            works.append(backend)
    found = ", ".join(works) + ("; not " + ", ".join(not_here) if not_here else "")
    return Check("attention", Part.core, State.ok, found)


def _flash_attn() -> str:
    """Why flash-attn cannot be used; empty if it can."""
    try:
        importlib.import_module("flash_attn")
    except ModuleNotFoundError:
        return "no flash-attn"
    except Exception as error:  # a build for another PyTorch, mostly
        return reason(error)
    return ""


if __name__ == "__main__":
    report(devices())
    report(attention())
