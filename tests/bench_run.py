"""Runs the rollout benchmark's real command, and checks that what it measured is what it says. Nothing depends on
times."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from verl_pte.bench.settings import METHODS, Settings

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, output: Path, environment: dict[str, str] | None = None) -> tuple[dict[str, Any], str]:
    """The JSON written to `output` and what was printed."""
    command = [sys.executable, "-m", "verl_pte.bench", "rollout", *arguments, "--output", str(output)]
    own = os.environ | {"MPLCONFIGDIR": str(output / "matplotlib")} | (environment or {})
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = output.glob("rollout_*.json")
    return json.loads(written.read_text()), done.stdout


def check_methods(settings: Settings, content: dict[str, Any], printed: str) -> None:
    """The methods took turns and held what the schedule says."""
    schedule, prompt_length = settings.method("pte").schedule(), settings.prompt_length
    limit = schedule.cache_limit(prompt_length)
    assert limit is not None
    turns = [(s["length"], s["repeat"], s["method"]) for s in content["samples"]]
    assert turns == [(n, i, m) for n in settings.lengths for i in range(settings.repeats) for m in METHODS]
    for sample in content["samples"]:
        length = sample["length"]
        assert sample["tokens"] == settings.num_seqs * length
        assert sample["seconds"] > 0
        full = prompt_length + length - 1  # the last token is sampled and not run
        bounded = sample["method"] != "full"
        assert sample["peak_cache_tokens"] == (min(full, limit) if bounded else full)
        assert sample["evictions"] == (schedule.num_evictions(prompt_length, full) if bounded else 0)
    held = {(row["method"], row["length"]): row["held_bytes"] for row in content["summary"]}
    by_length = [held["full", length] for length in settings.lengths]
    assert by_length == sorted(set(by_length)), "the full cache grows"
    longest = settings.lengths[-1]
    for method in ("lora_c", "pte"):
        assert held[method, settings.lengths[-2]] == held[method, longest] < held["full", longest]
    allocated = {method: values["allocated_bytes"] for method, values in content["memory"].items()}
    assert allocated["lora_c"] <= allocated["pte"] < allocated["full"]
    ratios = {row["length"]: row["time_ratio"] for row in content["summary"] if row["method"] == "pte"}
    assert content["time_ratios"]["PTE / LoRA_c"] == {str(length): ratio for length, ratio in ratios.items()}
    assert content["versions"]["torch"] and content["machine"]["cores"] > 0
    assert all(title in printed for title, _ in METHODS.values())
    assert f"engine: {settings.engine}" in printed
