"""``verl-pte doctor``: what it finds here, what it finds where something is broken, and how it ends.

Breakage is made by environment variables, by modules that stand before the real ones on PYTHONPATH, and by a
sitecustomize that lies about a version.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from verl_pte.cli import app
from verl_pte.doctor import examine, packages, self_test, torch_probe
from verl_pte.doctor import probe as probing
from verl_pte.doctor.check import Check, Part, State
from verl_pte.doctor.probe import probe

ROOT = Path(__file__).resolve().parents[1]
COMMAND = Path(sys.executable).with_name("verl-pte")
VARIABLES = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shadow(tmp_path, monkeypatch):
    """Puts modules before the real ones, for processes that are started."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def put(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    return put


def version_is(package: str, version: str) -> str:
    """A sitecustomize in which a package has another version."""
    return (
        "import importlib.metadata as m\n"
        "real = m.version\n"
        f"m.version = lambda name: {version!r} if name == {package!r} else real(name)\n"
    )


def named(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


# -- the whole command
# ---------------------------------------------------------------------------------------------------


def test_this_environment_works() -> None:
    done = subprocess.run([COMMAND, "doctor", "--json"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert report["ok"] is True and report["for"] == ["verl"]
    must = ("python", "verl_pte", "packages", "extra verl", "attention", "self test")
    must += ("verl imports", "verl plugin", "verl platform", "training engine", "vllm")
    assert {name: found[name]["state"] for name in must} == dict.fromkeys(must, "ok"), report
    assert f"torch {metadata.version('torch')}" in found["packages"]["found"]
    assert "verl 0.9.1" in found["extra verl"]["found"] and "0.27.1" in found["vllm"]["found"]
    assert "fsdp2 on " in found["training engine"]["found"]
    assert "sdpa, eager" in found["attention"]["found"]
    evictions, difference = re.search(r"(\d+) evictions: .* by (\S+)$", found["self test"]["found"]).groups()
    assert int(evictions) > 8 and 0 < float(difference) < 1e-4


def test_a_broken_environment_is_reported_in_full(shadow, monkeypatch) -> None:
    """A vLLM that does not import is a warning; verl without the plugin is what fails it; the rest is examined."""
    shadow("vllm", "raise ImportError('libcudart.so.13 is missing')")
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "another")
    done = subprocess.run(
        [COMMAND, "doctor"], capture_output=True, text=True, timeout=600, env=os.environ | {"COLUMNS": "400"}
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = {" ".join(line.split()[:2]): line for line in done.stdout.splitlines() if line.strip()}
    assert "VERL_USE_EXTERNAL_PLUGINS=another leaves it out; unset it, or add verl_pte" in lines["problem verl"]
    assert "libcudart.so.13 is missing" in lines["warning vllm"]
    assert "ok self" in lines and "Traceback" not in done.stdout + done.stderr
    assert done.stdout.strip().endswith("verl: does not work here")


def test_a_torch_that_does_not_import_leaves_the_doctor_alive(shadow) -> None:
    shadow("torch", "raise OSError('libtorch_cpu.so: undefined symbol')")
    done = subprocess.run([COMMAND, "doctor", "--json", "--for", "core"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    for name in ("devices", "self test"):
        assert found[name]["state"] == "problem" and "undefined symbol" in found[name]["found"]
    assert found["verl plugin"]["state"] == "warning"


def check(part: Part, state: State) -> Check:
    return Check(f"{part} thing", part, state, "[found] this", "do [that]")


@pytest.mark.parametrize(
    ("checks", "goals", "status"),
    [
        ([check(Part.core, State.ok), check(Part.core, State.warning)], (), 0),
        ([check(Part.core, State.problem)], ("core",), 1),
        ([check(Part.core, State.problem)], ("vllm",), 1),
        ([check(Part.verl, State.problem)], (), 1),
        ([check(Part.verl, State.problem)], ("core",), 0),
        ([check(Part.verl, State.problem)], ("vllm",), 0),
        ([check(Part.vllm, State.problem)], (), 0),
        ([check(Part.vllm, State.problem)], ("verl", "vllm"), 1),
        ([check(Part.extra, State.warning)], (), 0),
    ],
)
def test_exit_status(checks, goals, status, monkeypatch) -> None:
    monkeypatch.setattr(examine, "examine", lambda: checks)
    asked = ["doctor", *(word for goal in goals for word in ("--for", goal))]
    shown = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert shown.exit_code == status, shown.output
    assert shown.stdout.strip().endswith(
        f"{', '.join(goals or ['verl'])}: {'does not work here' if status else 'works here'}"
    )
    assert "[found] this" in shown.stdout and "do [that]" in shown.stdout, "brackets are not markup"
    assert ("problem" in shown.stdout) == bool(status)
    report = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert report["ok"] == (status == 0)
    assert [c["name"] for c in report["checks"]] == [c.name for c in checks]


def test_commands_of_the_documentation(monkeypatch) -> None:
    monkeypatch.setattr(examine, "examine", lambda: [check(Part.core, State.ok)])
    commands = re.findall(r"^    verl-pte (doctor.*)$", (ROOT / "docs" / "doctor.md").read_text(), flags=re.M)
    assert len(commands) >= 3
    for command in commands:
        assert CliRunner().invoke(app, shlex.split(command)).exit_code == 0, command


# -- packages
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "version", "row", "state", "advice"),
    [
        ("peft", "0.22.0", "packages", State.problem, "pip install 'peft<0.22,>=0.21'"),
        ("transformers", "5.6.0", "packages", State.problem, "transformers!=5.6.0"),
        ("transformers", "5.12.0", "extra verl", State.problem, "'transformers<5.11' for training with verl"),
        ("verl", "0.9.2", "extra verl", State.problem, "'verl==0.9.1'"),
        ("verl", None, "extra verl", State.problem, "'verl==0.9.1'"),
        ("cachetools", None, "extra verl", State.problem, "pip install 'cachetools'"),
        ("matplotlib", None, "extra docs", State.warning, "for plots"),
        ("math-verify", None, "extra eval", State.warning, "for the math reward"),
    ],
)
def test_versions(package, version, row, state, advice, monkeypatch) -> None:
    real = metadata.version

    def lying(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    assert named(packages.check_packages())[row].state is State.ok
    monkeypatch.setattr(metadata, "version", lying)
    found = named(packages.check_packages())[row]
    assert (found.state, found.part) == (state, {"extra verl": Part.verl, "packages": Part.core}.get(row, Part.extra))
    assert advice in found.advice
    assert (f"{package} {version}" if version else f"no {package}") in found.found
    others = {name: c.state for name, c in named(packages.check_packages()).items() if name in ("python", "verl_pte")}
    assert set(others.values()) == {State.ok}


def test_python_is_too_old(monkeypatch) -> None:
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.10.4")
    found = named(packages.check_packages())["python"]
    assert (found.state, found.advice) == (State.problem, "needs Python >=3.11")


def test_this_package_is_not_installed(monkeypatch) -> None:
    """It then runs from a checkout; neither verl nor vLLM finds the plugin."""

    def missing(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    (found,) = packages.check_packages()
    assert found.state is State.problem and "is not installed" in found.found and "pip install -e" in found.advice


def test_an_installation_older_than_the_code(monkeypatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    found = named(packages.check_packages())
    for group, part in (("verl.plugins", Part.verl), ("vllm.general_plugins", Part.vllm)):
        check = found[f"entry point {group}"]
        assert (check.state, check.part, check.found) == (State.problem, part, "missing")


def test_without_verl_it_is_not_probed(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(examine, "_installed", lambda name: False)
    monkeypatch.setattr(examine, "probe", lambda module, *rest: asked.append(module) or [])
    examine.examine()
    assert sorted(asked) == [f"verl_pte.doctor.{name}" for name in ("self_test", "torch_probe", "vllm_probe")]


# -- verl and vLLM
# -------------------------------------------------------------------------------------------------------


def verl_probe() -> dict[str, Check]:
    return named(probe("verl_pte.doctor.verl_probe", "verl plugin", Part.verl))


def test_a_dependency_of_verl_that_does_not_import(shadow) -> None:
    shadow("transfer_queue", "raise ImportError('built for another Python')")
    found = verl_probe()
    assert found["verl imports"].state is State.problem
    assert found["verl imports"].found == "ImportError: built for another Python"
    assert "verl plugin" in found, "what comes after it is examined too"


def test_another_version_of_verl(shadow) -> None:
    shadow("sitecustomize", version_is("verl", "0.10.0"))
    found = verl_probe()["verl plugin"]
    assert found.state is State.problem and "found verl 0.10.0" in found.found


def test_a_platform_verl_does_not_know(monkeypatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "abacus")
    found = verl_probe()["verl platform"]
    assert found.state is State.problem and "VERL_PLATFORM=abacus" in found.found
    assert found.advice == "unset VERL_PLATFORM"


def test_a_verl_that_does_not_import(shadow) -> None:
    shadow("verl", "raise RuntimeError('half installed')")
    found = verl_probe()["verl plugin"]
    assert (found.state, found.found) == (State.problem, "RuntimeError: half installed")
    assert "python -m verl_pte.doctor.verl_probe" in found.advice


def vllm_probe() -> Check:
    (found,) = probe("verl_pte.doctor.vllm_probe", "vllm", Part.vllm)
    return found


def test_vllm_of_another_version_or_none(shadow) -> None:
    lie = "import importlib.metadata as m\nreal = m.version\ndef version(name):\n    if name.startswith('vllm'): {}\n"
    lie += "    return real(name)\nm.version = version\n"
    shadow("sitecustomize", lie.format("return '0.26.0'"))
    found = vllm_probe()
    assert (found.state, found.found) == (State.problem, "0.26.0") and "pip install 'vllm==0.27.1'" in found.advice
    shadow("sitecustomize", lie.format("raise m.PackageNotFoundError(name)"))
    found = vllm_probe()
    assert (found.state, found.found) == (State.problem, "not installed") and "verl-pte[vllm]" in found.advice


def test_the_other_runner_of_vllm(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    found = vllm_probe()
    assert found.state is State.problem and "VLLM_USE_V2_MODEL_RUNNER=1" in found.found


# -- probes that die, devices, self test
# ---------------------------------------------------------------------------------


def test_a_probe_that_dies_or_hangs(shadow, monkeypatch) -> None:
    before = (
        "from verl_pte.doctor.check import Check, Part, State\n"
        "from verl_pte.doctor.probe import report\n"
        "report(Check('first', Part.core, State.ok, 'fine'))\n"
    )
    shadow("dies", before + "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    shadow("hangs", before + "import time\ntime.sleep(600)\n")
    first, second = probe("dies", "second", Part.core)
    assert first == Check("first", Part.core, State.ok, "fine")
    assert (second.name, second.state, second.found) == ("second", State.problem, "exit status -11")
    monkeypatch.setattr(probing, "_SECONDS", 10)
    first, second = probe("hangs", "second", Part.core)
    assert first.name == "first" and second.found == "not done after 10 seconds"


def driver(folder: Path, monkeypatch) -> None:
    """A machine with an NVIDIA driver."""
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_devices(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch_probe.shutil, "which", lambda name: None)
    found = torch_probe.devices()
    assert (found.state, found.found) == (State.warning, "CPU alone; torch built without CUDA")
    monkeypatch.undo()

    driver(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = torch_probe.devices()
    assert (found.state, found.part, found.advice) == (State.problem, Part.verl, "install PyTorch's CUDA build")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver too old" in torch_probe.devices().advice

    class Properties:
        name, total_memory = "NVIDIA H100", 80 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    found = torch_probe.devices()
    assert found.state is State.ok
    assert found.found == "NVIDIA H100 80 GiB, NVIDIA H100 80 GiB; torch built for CUDA 13.0; driver 570.86"


def test_attention_backends(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without = torch_probe.attention().found
    assert without == "sdpa, eager; not flex_attention (needs a GPU), flash_attention_2 (needs a GPU)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert torch_probe.attention().found == "sdpa, eager, flex_attention; not flash_attention_2 (no flash-attn)"
    monkeypatch.setitem(sys.modules, "flash_attn", torch)
    assert torch_probe.attention().found == "sdpa, eager, flex_attention, flash_attention_2"


def test_self_test_judges_the_difference() -> None:
    assert self_test.judge(9e-5, 3, "cpu").state is State.ok
    assert self_test.judge(2e-4, 3, "cpu").state is State.problem
    assert self_test.judge(float("nan"), 3, "cpu").state is State.problem
    assert self_test.judge(0.0, 0, "cpu").state is State.problem, "it has to go past the window"
