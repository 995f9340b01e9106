"""What `import verl` does with the plugin installed, and what a missing or broken one leads to.

Each in a fresh interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray._common.utils import get_ray_address_file

from verl_pte.verl.cpu_platform import accelerator_present

BUILD = "from verl_pte.verl.config import PTEModelConfig as C; C(path={path!r}, pte={{'rank': 4}}, lora={{'rank': 4}})"


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Of a machine that is part of no Ray cluster, unless `env` says so."""
    drop = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS")
    clean = {key: value for key, value in os.environ.items() if key not in drop}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"RAY_ADDRESS": "local"} | env,
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )


def test_importing_verl_stays_light_and_engines_register_with_the_model_config(folder):
    device = "cuda" if accelerator_present() else "cpu"
    code = f"""
import sys, verl
from verl.plugin.platform import get_platform
heavy = ("vllm", "megatron", "flash_attn", "peft", "verl.workers.engine", "verl_pte.config")
loaded = [m for m in heavy if m in sys.modules]
assert not loaded, loaded
assert "verl_pte.verl.plugin" in sys.modules and sys.modules["verl_pte.verl.plugin"].failure is None
assert get_platform().device_name == "{device}", get_platform()
from verl.workers.engine import EngineRegistry
from verl.workers.rollout.replica import RolloutReplicaRegistry
assert "pte_language_model" not in EngineRegistry._engines
{BUILD.format(path=str(folder / "model"))}
assert EngineRegistry.get_engine_cls("pte_language_model", "fsdp2").__name__ == "PTEEngine"
assert RolloutReplicaRegistry.get("pte").__name__ == "NativeReplica"
loaded = [m for m in ("vllm", "flash_attn") if m in sys.modules]  # megatron-core verl itself imports, where it is
assert not loaded, loaded
"""
    run = python(code)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(
    "breakage",
    [
        "import sys; sys.modules['verl_pte.verl.cpu_platform'] = None",  # a module of ours cannot be imported
        "import importlib.metadata as m; real = m.version; m.version = lambda p: '0.10.0' if p == 'verl' else real(p)",
    ],
    ids=["import error", "other verl version"],
)
def test_a_broken_plugin_leaves_verl_alone_and_stops_a_pte_run(folder, breakage):
    code = f"""
{breakage}
import verl
from verl.workers.config import HFModelConfig
HFModelConfig(path={str(folder / "model")!r})
print("verl works")
{BUILD.format(path=str(folder / "model"))}
"""
    run = python(code)
    assert "verl works" in run.stdout, run.stderr[-3000:]
    assert run.returncode != 0
    assert "RuntimeError: the verl_pte plugin could not register with verl" in run.stderr
    assert "cpu_platform" in run.stderr or "found verl 0.10.0" in run.stderr


def test_a_missing_plugin_stops_a_pte_run(folder):
    run = python(f"import verl\n{BUILD.format(path=str(folder / 'model'))}", VERL_USE_EXTERNAL_PLUGINS="none")
    assert run.returncode != 0
    assert "RuntimeError: verl did not load the verl_pte plugin" in run.stderr
    assert "VERL_USE_EXTERNAL_PLUGINS" in run.stderr


PLATFORM = """
import os, verl
from verl.plugin.platform import PlatformRegistry
print(PlatformRegistry.get("cpu") is not None, os.environ.get("VERL_PLATFORM"))
"""


@pytest.mark.parametrize(
    ("env", "printed"),
    [
        ({"VERL_PLATFORM": "cpu"}, "True cpu"),
        ({"VERL_PLATFORM": "cpu", "RAY_ADDRESS": "10.0.0.1:6379"}, "True cpu"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "False None"),
        ({"RAY_ADDRESS": "local"}, f"{not accelerator_present()} {None if accelerator_present() else 'cpu'}"),
        ({"VERL_PLATFORM": "nvidia"}, "False nvidia"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value,
)
def test_the_cpu_platform_is_for_those_who_ask_and_for_machines_alone(env, printed):
    """A cluster's head without accelerators keeps what verl would have there, for runs of PTE and any others."""
    run = python(PLATFORM, **env)
    assert run.stdout.strip() == printed, run.stderr[-3000:]


def test_a_cluster_that_was_started_here_is_found(tmp_path, monkeypatch):
    """By the file that `ray start` leaves, where Ray says it is."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    file = Path(get_ray_address_file(None))
    file.parent.mkdir()
    file.write_text("10.0.0.1:6379")
    assert python(PLATFORM, RAY_TMPDIR=str(tmp_path), RAY_ADDRESS="").stdout.strip() == "False None"


def test_any_of_our_modules_can_be_the_first():
    run = python(
        "from verl_pte.verl.cpu_platform import PlatformCPU\n"
        "from verl_pte.verl import plugin\n"
        "assert plugin.failure is None, plugin.failure"
    )
    assert run.returncode == 0, run.stderr[-3000:]
