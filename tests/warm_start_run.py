"""Runs of ``verl-pte warm-start`` on a tiny model, and what they leave."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner
from verl_run import PTE

from verl_pte.cli import app

COMMAND = Path(sys.executable).with_name("verl-pte")
STEPS = 8
SAMPLED = ("--temperature=1", "--batch-size=3", "--micro-batch=2", "--seed=1")  # some answers end early


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    """Of a tiny run in which every step sees the same greedy answers."""
    named = {
        "model": folder / "model",
        "prompts": folder / "prompts.parquet",
        "output": output,
        "steps": STEPS,
        "batch-size": 5,
        "micro-batch": 3,
        "lr": 1e-2,
        "warmup-steps": 2,
        "temperature": 0,
        "max-prompt-length": 64,
        "max-response-length": 40,
        "save-every": 3,
        "device": "cpu",
    }
    knobs = [f"--pte={key}={value}" for key, value in PTE.items()]
    return ["warm-start", *(f"--{key}={value}" for key, value in named.items()), *knobs, *more]


def run(folder: Path, output: Path, *more: str):
    return CliRunner().invoke(app, arguments(folder, output, *more))


def log(output: Path) -> list[dict]:
    """Without times."""
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def assert_same_to_rounding(expected: Path, found: Path) -> None:
    """Log and adapter of two runs that add up in other orders.

    AdamW's steps are of size `lr` however small a gradient is, so rounding in the small ones counts for more than a
    weight's own: over other seeds and settings, a tensor was off by up to 4e-5 of its norm, a logged number by 2e-6.
    """
    for left, right in zip(log(expected), log(found), strict=True):
        assert left["tokens"] == right["tokens"]
        for key in ("kl", "grad_norm"):
            assert right[key] == pytest.approx(left[key], rel=2e-5), (left["step"], key)
    adapter = weights(found)
    assert adapter.keys() == weights(expected).keys()
    for name, tensor in weights(expected).items():
        assert (adapter[name] - tensor).norm() <= 2e-4 * tensor.norm(), name
