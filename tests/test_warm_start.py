"""``verl-pte warm-start``: prompts, steps, what a killed run leaves, several ranks, and what is refused."""

import dataclasses
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from verl_run import PTE, make_model

from verl_pte import SamplingParams
from verl_pte.cli import app
from verl_pte.cli.warm_start import warm_start
from verl_pte.distill import SelfDistillation
from verl_pte.distill.folder import RunFolder
from verl_pte.distill.plan import Plan
from verl_pte.distill.prompts import read_prompts
from verl_pte.distill.settings import WarmStartSettings

COMMAND = Path(sys.executable).with_name("verl-pte")
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with model/ and prompts.parquet, five short conversations and one that is long."""
    path = tmp_path_factory.mktemp("warm")
    make_model(path / "model", initializer_range=0.3)
    texts = [f"{i} + {i * 7 % 10} = " for i in range(5)] + ["long " * 40]
    rows = [[{"role": "user", "content": text}] for text in texts]
    pq.write_table(pa.table({"prompt": rows, "text": texts, "label": list(range(6))}), path / "prompts.parquet")
    return path


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


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """The folder of a run that nothing stopped."""
    result = run(folder, folder / "whole")
    assert result.exit_code == 0, result.output
    assert f"adapter: {folder / 'whole' / 'adapter'}" in result.output
    assert "5 prompts; 1 longer than 64 left out" in result.output
    cut = sum(record["cut"] for record in log(folder / "whole"))
    assert 0 < cut <= 40 and f"{cut} of 40 answers were cut off at --max-response-length 40" in result.output
    assert "outgrew" not in result.output
    return folder / "whole"


SAMPLED = ("--temperature=1", "--batch-size=3", "--micro-batch=2", "--seed=1")  # some answers end early


@pytest.fixture(scope="module")
def sampled(folder) -> Path:
    """As `whole`, with sampled answers, and prompts and answers that change from step to step."""
    assert run(folder, folder / "sampled", *SAMPLED).exit_code == 0
    return folder / "sampled"


def test_answers_that_fit_into_the_window_are_said_to_teach_nothing(folder, tmp_path):
    short = ("--max-response-length=12", "--steps=1", "--warmup-steps=0")
    result = run(folder, tmp_path / "out", *short)
    assert result.exit_code == 0 and "no answer outgrew the window of 16 tokens" in result.output
    without_memory = run(folder, tmp_path / "lora_c", *short, "--pte=freeze_state=true")
    assert without_memory.exit_code == 0 and "outgrew" not in without_memory.output


# -- a run
# --------------------------------------------------------------------------------------------------------------


def test_the_divergence_falls(whole):
    records = log(whole)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["kl"] < 0.75 * records[0]["kl"], records
    assert all(record["grad_norm"] > 0 and record["tokens"] == records[0]["tokens"] for record in records)
    assert all(record["update_ratio"] > 0 for record in records), "answers are longer than the window"
    assert records[1]["lr"] == 1e-2 and records[-1]["lr"] == pytest.approx(1e-3)
    assert (whole / "kl.png").stat().st_size > 0
    left = {path.name for path in whole.iterdir()}
    assert left == {"adapter", "kl.png", "log.jsonl", "settings.json"}, "a finished run keeps no checkpoint"


def test_the_adapter_is_what_was_trained(whole, folder):
    """It loads, and the next KL on the same answers is below the last one that was logged."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, whole / "adapter", is_trainable=True)
    assert model.peft_config["default"].window == PTE["window"]
    distillation = SelfDistillation(model, tokenizer, max_num_seqs=5, max_prompt_length=64, max_response_length=40)
    prompts = read_prompts(str(folder / "prompts.parquet"), "prompt", tokenizer, 64).token_ids

    answers = distillation.rollouts(prompts, SamplingParams(temperature=0, max_tokens=40))
    found = distillation.backward(prompts, [answer.token_ids for answer in answers])
    assert found.num_tokens == log(whole)[-1]["tokens"]
    assert found.divergence < log(whole)[-1]["kl"]


def test_the_adapter_generates(whole, folder):
    named = ["--model", str(folder / "model"), "--adapter", str(whole / "adapter"), "--dtype", "float32"]
    result = CliRunner().invoke(app, ["generate", *named, "--prompt", "1 + 7 =", "--max-tokens", "30"])
    assert result.exit_code == 0 and f"cache_limit={32 + PTE['window']}" in result.output, result.output


def test_a_finished_run_says_so(whole, folder):
    before = (whole / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    result = run(folder, whole)
    assert result.exit_code == 0 and "this run has finished" in result.output
    assert (whole / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


# -- stopped and continued
# ----------------------------------------------------------------------------------------------


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_ends_in_the_adapter_of_an_uninterrupted_one(sampled, folder):
    """Killed twice, with steps after the checkpoint that are lost and a line that is half written."""
    output = folder / "killed"
    for steps in (2, 5):  # before the first checkpoint, and after it
        process = subprocess.Popen([COMMAND, *arguments(folder, output, *SAMPLED)], stderr=subprocess.DEVNULL)
        try:
            path = output / "log.jsonl"
            wait_for(lambda path=path, steps=steps: path.exists() and path.read_text().count("\n") >= steps, process)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        assert not (output / "adapter").exists()
    with (output / "log.jsonl").open("a") as half:
        half.write('{"step": 7, "k')
    (output / "checkpoint.pt.unfinished").write_bytes(b"half")
    (output / "adapter.unfinished").mkdir(exist_ok=True)
    result = run(folder, output, *SAMPLED)
    assert result.exit_code == 0 and "going on after step" in result.output, result.output
    assert log(output) == log(sampled)
    expected, found = weights(sampled), weights(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_killed_between_the_last_checkpoint_and_the_adapter(whole, folder, monkeypatch):
    output = folder / "last"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", lambda self, model: os.kill(os.getpid(), signal.SIGINT))
        assert run(folder, output).exit_code == 130
    assert not (output / "adapter").exists()
    assert run(folder, output).exit_code == 0
    assert log(output) == log(whole)
    assert all(torch.equal(tensor, weights(output)[name]) for name, tensor in weights(whole).items())


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


def two_ranks(folder: Path, output: Path) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    return [*torchrun, str(COMMAND), *arguments(folder, output, *SAMPLED)]


@pytest.fixture(scope="module")
def ranks(folder) -> Path:
    """As `sampled`, by two ranks. Shares of a step's three prompts are uneven."""
    done = subprocess.run(two_ranks(folder, folder / "ranks"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("adapter: ") == 1, "one rank speaks"
    return folder / "ranks"


def test_two_ranks_train_what_one_does(sampled, ranks):
    assert_same_to_rounding(sampled, ranks)


def test_two_ranks_that_were_stopped_end_in_the_adapter_of_uninterrupted_ones(ranks, folder):
    output = folder / "stopped ranks"
    process = subprocess.Popen(two_ranks(folder, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        path = output / "log.jsonl"
        wait_for(lambda: path.exists() and path.read_text().count("\n") >= 4, process)
    finally:
        process.terminate()  # torchrun ends its ranks
        process.wait()
    assert (output / "checkpoint.pt").exists() and not (output / "adapter").exists()
    done = subprocess.run(two_ranks(folder, output), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "going on after step" in done.stdout + done.stderr, done.stderr[-4000:]
    assert log(output) == log(ranks)
    assert all(torch.equal(tensor, weights(output)[name]) for name, tensor in weights(ranks).items())


def test_a_run_may_go_on_with_other_memory_settings_only(sampled, folder, monkeypatch):
    """Stopped two steps after a checkpoint."""
    output, add = folder / "other memory", RunFolder.add

    def stop_after_step_5(self, record) -> None:
        add(self, record)
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add", stop_after_step_5)
        assert run(folder, output, *SAMPLED).exit_code == 130
    for changed, message in (
        ("--lr=0.5", "--lr 0.5: --output"),
        ("--steps=9", "--steps 9: "),
        ("--pte=window=24", "--pte window 24: "),
        ("--max-prompt-length=500", "--max-prompt-length 500: "),
        ("--prompt-column=text", "--prompts 5 of digest"),
    ):
        result = run(folder, output, *SAMPLED, changed)
        assert result.exit_code == 2 and message in result.output.replace("\n", " "), result.output
        assert "holds a run with" in result.output
    result = run(folder, output, *SAMPLED, "--micro-batch=1", "--max-num-seqs=2", "--pte=chunk_tokens=8")
    assert result.exit_code == 0 and "going on after step 3" in result.output, result.output
    assert_same_to_rounding(sampled, output)


def test_a_gradient_that_is_not_finite_ends_the_run(folder, monkeypatch):
    backward = SelfDistillation.backward

    def broken(self, *args, **kwargs):
        found = backward(self, *args, **kwargs)
        next(p for p in self.model.parameters() if p.requires_grad).grad.fill_(math.nan)
        return found

    monkeypatch.setattr(SelfDistillation, "backward", broken)
    result = run(folder, folder / "nan")
    assert result.exit_code == 1 and "step 1: the gradient's norm is nan" in result.output
    assert not (folder / "nan" / "adapter").exists()


# -- prompts, steps
# -----------------------------------------------------------------------------------------------------


def test_conversations_and_strings(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    path = str(folder / "prompts.parquet")
    for column, text in (
        ("prompt", "<|im_start|>user\n3 + 1 = <|im_end|>\n<|im_start|>assistant\n"),
        ("text", "3 + 1 = "),
    ):
        found = read_prompts(path, column, tokenizer, 64)
        assert len(found.token_ids) == 5 and found.num_too_long == 1
        assert tokenizer.decode(found.token_ids[3]) == text
    assert read_prompts(path, "prompt", tokenizer, 1000).num_too_long == 0
    digests = {read_prompts(path, column, tokenizer, 64).digest() for column in ("prompt", "text")}
    assert len(digests) == 2


def test_a_plan() -> None:
    plan = Plan(num_prompts=7, batch_size=3, steps=20, lr=1.0, warmup_steps=4, seed=0)
    seen = [index for step in range(7) for index in plan.batch(step)]
    for round_ in range(3):
        assert sorted(seen[7 * round_ : 7 * round_ + 7]) == list(range(7)), "each prompt once a round"
    assert seen[:7] != seen[7:14]
    seeds = Counter(plan.answer_seed(step, i) for step in range(20) for i in range(3))
    assert max(seeds.values()) == 1
    other = Plan(num_prompts=7, batch_size=3, steps=20, lr=1.0, warmup_steps=4, seed=1)
    assert plan.answer_seed(0, 0) != other.answer_seed(0, 0)
    assert [other.batch(step) for step in range(4)] != [plan.batch(step) for step in range(4)]
    rates = [plan.learning_rate(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


# -- refused
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model=nowhere/at/all"], "model=nowhere/at/all: no such directory"),
        (["--prompts=nowhere.parquet"], "--prompts nowhere.parquet: no such file"),
        (["--prompts={folder}/model/config.json"], "not a parquet file"),
        (["--prompt-column=question"], "--prompt-column question: .* it has prompt (list<"),
        (["--prompt-column=label"], "must hold lists of {role, content} or strings; .*label (int64)"),
        (["--max-prompt-length=4"], "--max-prompt-length 4: no prompt fits, all 6"),
        (["--max-response-length=4000"], "exceeds the model's max_position_embeddings=256"),
        (["--pte=window=20"], "--pte window=20: must be a multiple of block_size=8"),
        (["--pte=windw=16"], "--pte windw=16: no such setting; known are rank"),
        (["--pte=window"], "--pte window: must be KEY=VALUE"),
        (["--pte=window=null"], "--pte window=null: must be a number of tokens"),
        (["--pte=target_modules=[q_proj,w_pack]"], "target_modules=['w_pack']: no such linear"),
        (["--steps=0"], "--steps 0: must be at least 1"),
        (["--warmup-steps=8"], "--warmup-steps 8: must be in [0, --steps 8)"),
        (["--lr=0"], "--lr 0.0: must be a positive number"),
        (["--temperature=-1"], "--temperature -1.0: must be >= 0"),
        (["--top-p=0"], "--top-p 0.0: must be in (0, 1]"),
        (["--dtype=int8"], "--dtype int8: must be one of auto"),
        (["--device=cuda"], "--device cuda: this PyTorch sees no CUDA device"),
        (["--device=cup"], "--device cup: must be auto, cpu, cuda"),
        (["--output={folder}/model"], "holds .* and no warm start"),
        (["--output={folder}/prompts.parquet"], "must be a folder, this is a file"),
    ],
    ids=lambda value: value[0].split("=")[0].strip("-") if isinstance(value, list) else "",
)
def test_refused(folder, tmp_path, more, message):
    if "device=cuda" in more[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = run(folder, tmp_path / "out", *(argument.format(folder=folder) for argument in more))
    assert result.exit_code == 2, result.output
    *parts, last = message.split(" .*") if ".*" in message else [message]
    assert all(part.strip() in result.output.replace("\n", " ") for part in (*parts, last)), result.output
    assert not (tmp_path / "out" / "settings.json").exists(), "what failed at once claims no folder"


def test_rows_without_a_prompt(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for rows in (["a", None], ["a", ""]):
        pq.write_table(pa.table({"text": rows}), tmp_path / "p.parquet")
        with pytest.raises(ValueError, match=r"row 1 of column 'text' is empty"):
            read_prompts(str(tmp_path / "p.parquet"), "text", tokenizer, 64)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; use an instruct model, or a column of plain strings"):
        read_prompts(str(folder / "prompts.parquet"), "prompt", tokenizer, 64)


def test_defaults_are_said_once_and_documented() -> None:
    """On the command line, in the settings and in docs/warm_start.md."""
    options = {name: parameter.default for name, parameter in inspect.signature(warm_start).parameters.items()}
    settings = {
        f.name: f.default for f in dataclasses.fields(WarmStartSettings) if f.default is not dataclasses.MISSING
    }
    assert settings.items() <= options.items()
    text = (Path(__file__).parents[1] / "docs" / "warm_start.md").read_text()
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|]+) \|", text, flags=re.M)
    documented = {}
    for names, values in rows:
        names = [name.strip("`").removeprefix("--").replace("-", "_") for name in names.split(", ")]
        documented |= dict(zip(names, values.split(", "), strict=True)) if "KEY=VALUE" not in names[0] else {}
    assert documented.keys() == settings.keys()
    for name, value in settings.items():
        expected = documented[name].strip()
        assert expected == "all of a step" if value is None else str(value) == str(type(value)(expected)), name
