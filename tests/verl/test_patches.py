"""The runtime patches: each takes effect where verl uses it, once, and refuses versions it was not read against."""

import enum
import inspect
import subprocess
import sys
from importlib import import_module

import peft
import pytest

VERL_PATCHES = {
    "validate_config": (
        "verl.utils.config",
        "validate_config",
        {"mentions": lambda config: False, "check_run": lambda config: None},
    ),
    "metric_names": ("verl.utils.py_functional", "rename_dict", {"fold": lambda key, values: 0.0}),
    "gloo_process_group": ("verl.utils.distributed", "initialize_global_process_group_ray", {}),
}


@pytest.fixture(params=VERL_PATCHES)
def patch(request, monkeypatch):
    """(the patch's apply with its arguments, a function of verl's module, the unpatched stand-in for it)."""
    module_name, name, arguments = VERL_PATCHES[request.param]
    module = import_module(module_name)

    def original(*_, **__):
        return "verl's own"

    monkeypatch.setattr(module, name, original)
    apply = import_module(f"verl_pte.patches.{request.param}").apply
    return lambda: apply(**arguments), lambda: getattr(module, name), original


def test_patch_refuses_another_verl(patch, monkeypatch):
    apply, current, original = patch
    monkeypatch.setattr("verl_pte.patches.version_guard.version", lambda package: "0.10.0")
    with pytest.raises(
        RuntimeError, match=r"patches verl 0\.9\.1 .*found verl 0\.10\.0\. .*pip install 'verl==0\.9\.1'"
    ):
        apply()
    assert current() is original


def test_patch_is_applied_once(patch):
    apply, current, original = patch
    apply()
    patched = current()
    assert patched is not original and inspect.unwrap(patched) is original
    apply()
    assert current() is patched


def test_peft_patch_refuses_another_peft(monkeypatch):
    from verl_pte.patches import peft_type

    monkeypatch.setattr(peft_type, "PeftType", enum.Enum("PeftType", {"LORA": "LORA"}, type=str))
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    with pytest.raises(RuntimeError, match=r"found peft 0\.22\.0\. .*peft>=0\.21,<0\.22"):
        peft_type.apply()
    assert "PTE" not in peft_type.PeftType.__members__


def test_verl_uses_the_patched_functions():
    """verl imports them by name; a patch applied too late, or to a function that moved, would change nothing."""
    code = """
import inspect, verl
from verl.trainer import main_ppo
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import distributed
used = main_ppo.validate_config, trainer_base.rename_dict, distributed.initialize_global_process_group_ray
patches = "verl_pte.patches.validate_config", "verl_pte.patches.metric_names", "verl_pte.patches.gloo_process_group"
for function, patch in zip(used, patches):
    assert function.__globals__["__name__"] == patch, (function, patch)
    assert inspect.unwrap(function) is not function and inspect.unwrap(function).__module__.startswith("verl.utils.")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert run.returncode == 0, run.stderr[-3000:]
