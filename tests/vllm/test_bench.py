"""The benchmark's real command, in its quick form: what it measures is what it says. Nothing here depends on times."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from verl_pte.bench import __main__ as command_line
from verl_pte.bench.settings import METHODS, QUICK, Settings

ROOT = Path(__file__).resolve().parents[2]


def run(engine: str, output: Path) -> tuple[dict[str, Any], str]:
    """The JSON and what was printed."""
    command = [
        sys.executable,
        "-m",
        "verl_pte.bench",
        "rollout",
        "--quick",
        "--engine",
        engine,
        "--output",
        str(output),
    ]
    environment = os.environ | {"MPLCONFIGDIR": str(output / "matplotlib")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((output / f"rollout_{engine}.json").read_text()), done.stdout


@pytest.mark.parametrize("engine", ["vllm", "native"])
def test_methods_side_by_side(engine: str, tmp_path: Path) -> None:
    content, printed = run(engine, tmp_path)
    settings = Settings(engine=engine, **QUICK)
    schedule, prompt_length = settings.method("pte").schedule(), settings.prompt_length
    limit = schedule.cache_limit(prompt_length)
    assert limit is not None

    # The methods took turns.
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
        if engine == "vllm":
            assert sample["peak_cache_blocks"] == schedule.blocks(sample["peak_cache_tokens"])

    held = {(row["method"], row["length"]): row["held_bytes"] for row in content["summary"]}
    shortest, middle, longest = settings.lengths
    assert held["full", shortest] < held["full", middle] < held["full", longest]
    assert all(held[method, middle] == held[method, longest] < held["full", longest] for method in ("lora_c", "pte"))
    # Beyond the blocks PTE has its states; the native engine has room for them in any case.
    states = settings.layers * settings.rank**2 * 4 if engine == "vllm" else 0
    assert held["pte", longest] == held["lora_c", longest] + states

    allocated = {method: values["allocated_bytes"] for method, values in content["memory"].items()}
    assert allocated["lora_c"] <= allocated["pte"] < allocated["full"]
    assert content["versions"]["torch"] and content["machine"]["cores"] > 0
    assert (tmp_path / f"rollout_{engine}.png").read_bytes().startswith(b"\x89PNG")
    assert all(title in printed for title, _ in METHODS.values())


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--engine", "sglang"], "--engine sglang: must be one of vllm, native"),
        (["--lengths", "64,0"], "--lengths 64,0: must be positive"),
        (["--lengths", "64;128"], "numbers with commas between"),
        (["--lengths", "128,64"], "must rise"),
        (["--window", "250"], "window=250: must be a multiple of block_size=16, e.g. 240 or 256"),
        (["--hidden-size", "100"], "--hidden-size 100: must be a multiple of 64"),
        (["--num-seqs", "0"], "--num-seqs 0: must be at least 1"),
        (["--device", "cuda"], "must be auto with --engine vllm"),
        (["--model", "nowhere/config.json"], "--model nowhere/config.json: there is none"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(command_line.app, ["rollout", *arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("verl_pte.vllm.version.installed_version", lambda: None)
    result = CliRunner().invoke(command_line.app, ["rollout", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "needs vllm==" in result.stderr


def test_sizes_of_a_real_config(tmp_path: Path) -> None:
    from verl_pte.bench.models import base_config

    sizes = dict(model_type="llama", vocab_size=61, hidden_size=96, num_hidden_layers=3, num_attention_heads=3)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sizes | {"max_position_embeddings": 2112}))
    for model in (path, tmp_path):
        config = base_config(Settings(model=str(model)))
        assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 96, 3)
    with pytest.raises(ValueError, match="--lengths 2049: .* exceeds the model's max_position_embeddings=2112"):
        base_config(Settings(model=str(path), lengths=(2049,)))


def test_a_process_that_dies_is_reported(tmp_path: Path) -> None:
    from verl_pte.bench.worker import Worker

    worker = Worker(Settings(engine="native", **QUICK), "pte", tmp_path / "no-models", tmp_path / "log")
    try:
        with pytest.raises(RuntimeError, match="the process of pte ended with status 1; .*log ends with"):
            worker.ready()
    finally:
        worker.close()
