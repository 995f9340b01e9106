"""The benchmark's real command, in its quick form: what it measures is what it says. Nothing here depends on times."""

import json
from pathlib import Path

import pytest
from bench_run import check_methods, run
from typer.testing import CliRunner

from verl_pte.bench import __main__ as command_line
from verl_pte.bench.settings import QUICK, Settings


def test_methods_side_by_side(tmp_path: Path) -> None:
    content, printed = run("--quick", "--engine", "vllm", output=tmp_path)
    settings = Settings(engine="vllm", **QUICK)
    check_methods(settings, content, printed)
    assert content["equal_memory"] is None
    schedule = settings.method("pte").schedule()
    assert all(s["peak_cache_blocks"] == schedule.blocks(s["peak_cache_tokens"]) for s in content["samples"])
    held = {row["method"]: row["held_bytes"] for row in content["summary"]}
    assert held["pte"] == held["lora_c"] + settings.layers * settings.rank**2 * 4  # the states
    # What fits into a budget is computed from sizes; vLLM says what it allocates.
    from verl_pte.bench.equal_memory import sequence_bytes

    for method, bytes_held in held.items():
        assert sequence_bytes(settings, method, settings.lengths[-1]) == bytes_held


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--engine", "sglang"], "--engine sglang: must be one of vllm, native"),
        (["--lengths", "64,0"], "--lengths 64,0: must be positive"),
        (["--budget-mib", "0"], "--budget-mib 0.0: must be positive"),
        (["--lengths", "64;128"], "numbers with commas between"),
        (["--lengths", "128,64"], "must rise"),
        (["--window", "250"], "window=250: must be a multiple of block_size=16, e.g. 240 or 256"),
        (["--hidden-size", "100"], "--hidden-size 100: must be a multiple of 64"),
        (["--num-seqs", "0"], "--num-seqs 0: must be at least 1"),
        (["--device", "cuda", "--engine", "vllm"], "must be auto with --engine vllm"),
        (["--model", "nowhere/config.json"], "--model nowhere/config.json: there is none"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(command_line.app, ["rollout", *arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("verl_pte.vllm.version.installed_version", lambda: None)
    result = CliRunner().invoke(command_line.app, ["rollout", "--engine", "vllm", "--output", str(tmp_path)])
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
        assert config.max_position_embeddings == 2112
    assert base_config(Settings(model=str(path), lengths=(2049,))).max_position_embeddings == 2113


def test_a_process_that_dies_is_reported(tmp_path: Path) -> None:
    from verl_pte.bench.worker import Worker

    worker = Worker(Settings(engine="native", **QUICK), "pte", tmp_path / "no-models", tmp_path / "log")
    try:
        with pytest.raises(RuntimeError, match="the process of pte ended with status 1; .*log ends with"):
            worker.ready()
    finally:
        worker.close()
