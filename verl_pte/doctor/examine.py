"""All checks of the doctor, in the order of the report."""

from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

from verl_pte.doctor.check import Check, Part
from verl_pte.doctor.packages import check_packages
from verl_pte.doctor.probe import probe

_PROBES = (
    ("verl_pte.doctor.torch_probe", "devices", Part.core),
    ("verl_pte.doctor.self_test", "self test", Part.core),
    ("verl_pte.doctor.verl_probe", "verl plugin", Part.verl),
    ("verl_pte.doctor.vllm_probe", "vllm", Part.vllm),
)


def examine() -> list[Check]:
    """Everything there is to find. Takes about as long as importing verl and vLLM does."""
    checks = check_packages()
    probes = [wanted for wanted in _PROBES if wanted[2] is not Part.verl or _installed("verl")]
    with ThreadPoolExecutor(2) as pool:  # each imports gigabytes
        for found in pool.map(lambda wanted: probe(*wanted), probes):
            checks += found
    return checks


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False  # check_packages says so
    return True
