"""The rollout benchmark on the native engine, which runs where there is no vLLM."""

import json
from pathlib import Path

import pytest
import torch
from bench_run import check_methods, run
from typer.testing import CliRunner

from verl_pte.bench import decode, equal_memory, report
from verl_pte.bench.__main__ import app
from verl_pte.bench.decode_settings import DecodeSettings
from verl_pte.bench.engines import NativeEngine, check_attention
from verl_pte.bench.models import make_models
from verl_pte.bench.settings import QUICK, Settings, default_engine

ARGUMENTS = ["--quick", "--json", "--lengths", "64,128", "--repeats", "1"]


@pytest.fixture
def without_vllm(tmp_path: Path) -> dict[str, str]:
    """Any import of vLLM fails, in the command's process and in its workers."""
    folder = tmp_path / "blocked"
    folder.mkdir()
    (folder / "vllm.py").write_text("raise ImportError('the native engine must not import vLLM')\n")
    from bench_run import ROOT

    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def test_native_engine_without_vllm(tmp_path: Path, without_vllm: dict[str, str]) -> None:
    content, printed = run(*ARGUMENTS, "--device", "cpu", output=tmp_path, environment=without_vllm)
    settings = Settings(**QUICK | {"engine": "native", "lengths": (64, 128), "repeats": 1, "device": "cpu"})
    check_methods(settings, content, printed)
    assert (tmp_path / "rollout_native.png").read_bytes().startswith(b"\x89PNG")
    line = json.loads(printed.splitlines()[-1])
    assert content.pop("samples") and line == content
    assert set(line["time_ratios"]) == {"PTE / LoRA_c", "PTE / full cache"}

    # As many sequences as fit, and not one more.
    rows = {(row["method"], row["length"]): row for row in content["equal_memory"]}
    assert list(rows) == [(m, n) for n in (64, 128) for m in ("full", "lora_c", "pte")]
    allocated = {(r["method"], r["length"]): r["allocated_bytes"] / settings.num_seqs for r in content["summary"]}
    budget = allocated["full", 128] * settings.num_seqs
    for key, row in rows.items():
        assert row["budget_bytes"] == budget and row["sequence_bytes"] == allocated[key]
        assert row["num_seqs"] == budget // allocated[key]
        assert row["tokens_per_second"] > 0
    assert rows["full", 128]["num_seqs"] == settings.num_seqs < rows["pte", 128]["num_seqs"]
    assert "tokens/s at equal cache memory" in printed


def test_default_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_pte.bench.settings.supported_version", lambda: True)
    assert [default_engine(device, "sdpa") for device in ("auto", "cpu", "cuda")] == ["vllm", "native", "native"]
    assert default_engine("auto", "eager") == "native"
    monkeypatch.setattr("verl_pte.bench.settings.supported_version", lambda: False)
    assert default_engine("auto", "sdpa") == "native"


def test_models_have_the_attention_asked_for(tmp_path: Path) -> None:
    settings = Settings(**QUICK | {"engine": "native", "attention": "eager", "device": "cpu"})
    make_models(settings, tmp_path)
    assert NativeEngine(settings, "pte", tmp_path).model.config._attn_implementation == "eager"
    assert decode._base(DecodeSettings(settings)).config._attn_implementation == "eager"


@pytest.mark.parametrize("command", ["rollout", "learner", "decode"])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--attention", "flash"], "--attention flash: must be one of sdpa, eager, flex_attention, flash_attention_2"),
        (["--attention", "flash_attention_2"], "takes --dtype bfloat16 or float16, not float32"),
        (["--attention", "flash_attention_2", "--dtype", "bfloat16"], "needs pip install 'verl-pte[flash-attn]'"),
    ],
)
def test_an_attention_that_is_not_to_be_had(
    command: str, arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("verl_pte.bench.settings.find_spec", lambda name: None)
    result = CliRunner().invoke(app, [command, *arguments, "--output", str(tmp_path)])
    assert result.exit_code == 2 and complaint in result.stderr


def test_an_attention_that_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_pte.bench.settings.find_spec", lambda name: "found")
    sizes = dict(engine="native", device="cpu", dtype="bfloat16")
    check_attention(Settings(**sizes, attention="flex_attention"), gradients=False)
    with pytest.raises(ValueError, match="--attention flex_attention: needs a GPU for gradients"):
        check_attention(Settings(**sizes, attention="flex_attention"), gradients=True)
    with pytest.raises(ValueError, match="--attention flash_attention_2: needs a GPU$"):
        check_attention(Settings(**sizes, attention="flash_attention_2"), gradients=False)
    with pytest.raises(ValueError, match="must be sdpa with --engine vllm, which has its own"):
        Settings(engine="vllm", attention="eager")


def test_a_budget_too_small_for_one_sequence() -> None:
    settings = Settings(**QUICK | {"engine": "native", "lengths": (64, 4096), "equal_memory": True, "budget_mib": 0.25})
    fitting = {(m, n): equal_memory.num_fitting(settings, m, n) for m in ("full", "pte") for n in settings.lengths}
    assert fitting["full", 4096] == 0 and fitting["pte", 64] == fitting["pte", 4096] > 0
    # Three methods at 64, two at 4096, each with a warm-up.
    assert equal_memory.total_work(settings) == 3 * 3 * 64 + 2 * 3 * 4096
    rows = [equal_memory._row(settings, method, 4096, []) for method in ("full", "lora_c", "pte")]
    assert rows[0]["num_seqs"] == 0 and rows[0]["tokens_per_second"] is None
    table = equal_memory.table(settings, rows)
    assert [next(column.cells) for column in table.columns][3:5] == ["0", "-"]


def test_ratios_are_within_a_turn() -> None:
    settings = Settings(**QUICK | {"engine": "native", "lengths": (8,), "repeats": 3})
    samples = []
    for repeat, slow in enumerate((1, 10, 2)):
        for method, seconds in (("full", 4), ("lora_c", 1), ("pte", 2)):
            sample = dict(method=method, length=8, repeat=repeat, seconds=seconds * slow, cpu_seconds=1.0, tokens=16)
            sample |= dict(evictions=0, peak_cache_tokens=8, peak_cache_blocks=None, held_bytes=1, allocated_bytes=1)
            samples.append(sample | dict(peak_memory=100 * slow, peak_gpu_memory=None))
    rows = report.summarize(settings, samples)
    assert report.time_ratios(rows) == {"PTE / LoRA_c": {"8": 2.0}, "PTE / full cache": {"8": 0.5}}
    pte = rows[-1]
    assert pte["time_ratio_range"] == [2.0, 2.0] and pte["cpu_time_ratio"] == 1.0 and pte["peak_memory"] == 1000


def test_peaks_are_counted_anew() -> None:
    import torch

    from verl_pte.bench.worker import peak_memory, reset_peaks

    if peak_memory() is None:
        pytest.skip("the system does not tell")
    big = torch.ones(64 * 2**20)  # 256 MiB
    high = peak_memory()
    del big
    reset_peaks()
    assert peak_memory() < high - 200 * 2**20


@pytest.mark.parametrize("command", [["rollout", "--engine", "native"], ["learner"], ["decode"]])
def test_a_gpu_that_is_not_there_is_named(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, [*command, "--device", "cuda", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "error: --device cuda: torch finds no CUDA device here" in result.stderr
