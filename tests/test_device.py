"""On a simulated accelerator (accelerator.py): nothing mixes devices, and the host waits no more often than it must."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest


@functools.cache
def on_device(*arguments: str) -> dict:
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("device_run.py"), *arguments], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_the_simulation_notices():
    found = on_device("mixed")
    assert "tensors of two devices" in found["refused"]
    assert found["waits"] == ["copy", "copy", "item", "list as index", "number", "tolist"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_store", ["device", "host"])
def test_a_replay_is_that_of_the_cpu(attention, kv_store):
    found = on_device("replay", "40", attention, kv_store)
    assert found["log_probs"] <= 1e-6 and found["gradients"] <= 1e-5


def test_a_replays_calls_do_not_wait():
    """With the store on the device; a store in host memory is copied to and from it by every call."""
    short, long = (on_device("replay", length, "sdpa", "device") for length in ("40", "80"))
    assert long["calls"] >= short["calls"] + 4
    assert long["waits"] == short["waits"], long["places"]


def test_a_rollout_is_that_of_the_cpu_and_waits_once_a_token():
    short, long = (on_device("engine", length) for length in ("20", "50"))
    assert short["same"] and long["same"] and long["evictions"] > short["evictions"] > 0
    assert long["waits"] - short["waits"] == 30, long["places"]
