"""The learner benchmark's real command, tiny: what it measures is what it says. Nothing here depends on times."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from verl_pte.bench import __main__ as command_line
from verl_pte.bench import step_memory
from verl_pte.bench.learner import LearnerWorker
from verl_pte.bench.learner_report import PAIRS
from verl_pte.bench.learner_settings import LearnerSettings
from verl_pte.bench.settings import METHODS
from verl_pte.bench.worker import Worker

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    lengths=(64, 160), window=32, prompt_length=20, rank=4, hidden_size=64, layers=2, repeats=1, chunk_tokens=32
)


def run(output: Path, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON printed last, and the file."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items() if key != "lengths"]
    command = [sys.executable, "-m", "verl_pte.bench", "learner", "--json", "--lengths", "64,160", *options, *more]
    environment = os.environ | {"MPLCONFIGDIR": str(output / "matplotlib")}
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), json.loads((output / "learner.json").read_text())


@pytest.fixture(scope="module", params=["peft", "verl"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with each baseline."""
    output = tmp_path_factory.mktemp("bench")
    return (request.param, *run(output, "--baseline", request.param), output)


def test_methods_side_by_side(result: Any) -> None:
    baseline, printed, content, output = result
    settings = LearnerSettings(**TINY, baseline=baseline)
    turns = [(s["length"], s["repeat"], s["method"]) for s in content["samples"]]
    assert turns == [(n, 0, m) for n in settings.lengths for m in METHODS]
    schedule = settings.method("pte").schedule()
    for sample in content["samples"]:
        assert sample["tokens"] == sample["length"]
        assert sample["seconds"] > 0 and sample["peak_bytes"] >= sample["rise_bytes"] > 0
        if sample["method"] != "full":
            run_tokens = settings.prompt_length + sample["length"] - 1
            assert sample["evictions"] == schedule.num_evictions(settings.prompt_length, run_tokens)
            assert sample["calls"] == len(schedule.chunks(settings.prompt_length, run_tokens, settings.chunk_tokens))
            # float32 keys and values of every token run: 2 layers, 1 kv head of 64
            assert sample["store_bytes"] == 2 * settings.layers * run_tokens * 64 * 4
    assert ("verl's FSDPEngineWithLMHead" in printed["baseline"]) == (baseline == "verl")
    assert "with gradient checkpointing" in printed["baseline"]
    assert (output / "learner.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_those_of_the_samples(result: Any) -> None:
    _, printed, content, _ = result
    samples = {(s["length"], s["method"]): s for s in content["samples"]}
    assert printed["ratios"] == content["ratios"] and printed["summary"] == content["summary"]
    for row in printed["ratios"]:
        for mine, other in PAIRS:
            for name, key in (("time", "seconds"), ("memory", "rise_bytes"), ("peak", "peak_bytes")):
                a, b = (samples[row["length"], method][key] for method in (mine, other))
                assert row[f"{mine}/{other}"][name] == [a / b] * 3


@pytest.mark.parametrize(("checkpointing", "attention"), [(True, "sdpa"), (False, "sdpa"), (True, "eager")])
def test_baseline_and_replay_compute_the_same(checkpointing: bool, attention: str, tmp_path: Path) -> None:
    """Loss and gradients: a frozen state is the identity, so without a window, or in one that nothing leaves, the
    replay is PEFT LoRA. verl's engine is compared with PEFT in tests/verl/test_learner_baseline.py.
    """
    from verl_pte.bench.learner_steps import PeftStep, ReplayStep, make_batch
    from verl_pte.bench.models import make_models

    more = dict(num_seqs=2, checkpointing=checkpointing, attention=attention)
    settings = LearnerSettings(**TINY | {"window": 256} | more)
    make_models(settings, tmp_path)
    batch = make_batch(settings, 8192, 64)
    peft = PeftStep(settings, tmp_path)
    for method in ("full", "lora_c"):
        replay = ReplayStep(settings, method, tmp_path)
        assert {step.model.config._attn_implementation for step in (peft, replay)} == {attention}
        ours = {n.replace("pte_adapter.default.", ""): p for n, p in replay.model.named_parameters() if "lora_" in n}
        theirs = {n.replace("default.", ""): p for n, p in peft.model.named_parameters() if "lora_" in n}
        assert ours.keys() == theirs.keys() and len(ours) == settings.layers * 7 * 2
        for name, parameter in theirs.items():
            parameter.data.copy_(ours[name])
        losses = []
        for step in (peft, replay):
            step.prepare(batch)
            losses.append(step.run()["loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for name, parameter in theirs.items():
            expected, found = parameter.grad, ours[name].grad
            assert expected is not None and found is not None and expected.norm() > 0
            assert (found - expected).norm() <= 1e-5 * expected.norm(), (method, name)


class _Step:
    """Fits once in two runs."""

    device, runs, runs_so_far = torch.device("cpu"), "a step of this test", 0

    def prepare(self, batch: Any) -> None:
        self.runs_so_far += 1

    def run(self) -> dict[str, Any]:
        if self.runs_so_far % 2:
            raise torch.OutOfMemoryError
        return {"loss": 0.0}


def test_a_step_that_does_not_fit_is_said_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_pte.bench import learner_steps, learner_worker

    monkeypatch.setattr(learner_steps, "make_step", lambda *_: _Step())
    job = {"settings": dataclasses.asdict(LearnerSettings(**TINY)), "method": "full", "models": ""}
    lines = [job, {"length": 64}, {"length": 64}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in lines)))
    answers = io.StringIO()
    learner_worker.serve(answers)
    _, failed, fitted = map(json.loads, answers.getvalue().splitlines())
    assert failed == {"out_of_memory": True, "length": 64, "tokens": 64}
    assert not fitted["out_of_memory"] and fitted["seconds"] > 0


def test_a_report_with_a_step_that_did_not_fit(result: Any, tmp_path: Path) -> None:
    from rich.console import Console

    from verl_pte.bench import learner_report

    settings, samples = LearnerSettings(**TINY), [dict(s) for s in result[2]["samples"]]
    longest = next(s for s in samples if (s["length"], s["method"]) == (160, "full"))
    longest["out_of_memory"] = True
    del longest["seconds"], longest["rise_bytes"]
    rows, ratios = learner_report.summarize(settings, samples), learner_report.ratios(settings, samples)
    assert [row["seconds"] is None for row in rows] == [s is longest for s in samples]
    assert ratios[1]["pte/full"]["time"] is None
    assert ratios[1]["pte/lora_c"] == result[2]["ratios"][1]["pte/lora_c"] and ratios[0] == result[2]["ratios"][0]
    console = Console(record=True, width=120)
    console.print(learner_report.tables(settings, rows, ratios, {}))
    assert console.export_text().count("out of") == 1
    learner_report.draw(settings, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.parametrize("watched", [False, True])
def test_memory_of_a_step_is_seen(watched: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also once it has been freed again, and by the thread where the peak cannot be started anew."""
    if watched:
        monkeypatch.setattr(step_memory, "_CLEAR", tmp_path / "no such folder" / "clear_refs")
    size = 64 * 2**20
    for _ in range(2):  # a second step does not inherit the first one's peak
        with step_memory.measured(torch.device("cpu")) as found:
            for _ in range(20):  # long enough for the thread to look
                torch.ones(size // 4)
        assert 0.9 * size < found.rise < 1.5 * size
        assert ("VmRSS" in found.how) == watched
    with step_memory.measured(torch.device("cpu")) as nothing:
        pass
    assert nothing.rise < 0.1 * size


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--baseline", "lora"], "--baseline lora: must be one of auto, verl, peft"),
        (["--lengths", "64,0"], "--lengths 64,0: must be positive"),
        (["--lengths", "64;128"], "numbers with commas between"),
        (["--window", "250"], "window=250: must be a multiple of block_size=16"),
        (["--chunk-tokens", "0"], "--chunk-tokens 0: must be at least 1"),
        (["--model", "qwen3"], "--model qwen3: there is none"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(command_line.app, ["learner", *arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_a_replay_that_evicted_otherwise_is_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = LearnerWorker.__new__(LearnerWorker)  # without its process
    worker.settings, worker.method = LearnerSettings(**TINY), "pte"
    right = worker.settings.method("pte").schedule().num_evictions(20, 20 + 160 - 1)
    monkeypatch.setattr(Worker, "measure", lambda self, length: {"out_of_memory": False, "evictions": right - 1})
    with pytest.raises(RuntimeError, match=f"pte: {right - 1} evictions, not {right}"):
        worker.measure(160)
    worker.method = "full"
    assert worker.measure(160) == {"out_of_memory": False, "evictions": right - 1}
    worker.method = "pte"
    monkeypatch.setattr(Worker, "measure", lambda self, length: {"out_of_memory": True})
    assert worker.measure(160) == {"out_of_memory": True}
