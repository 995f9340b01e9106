r"""``verl-pte evaluate`` on a tiny model: its items are the engine's, and a run that was stopped ends in the same."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from evaluate_run import (
    COMMAND,
    MAX_TOKENS,
    REWARD,
    ROWS,
    N,
    arguments,
    items,
    run,
    succeed,
    summary,
    with_adapter,
    write_data,
)
from transformers import AutoTokenizer
from typer.testing import CliRunner
from verl_run import PTE, make_adapter

from verl_pte import RolloutEngine, SamplingParams
from verl_pte.cli import app
from verl_pte.eval.folder import EvaluationFolder
from verl_pte.eval.items import item_seed
from verl_pte.peft.saved import load, saved_config


def test_items_are_what_the_engine_generates(whole: Path, folder: Path) -> None:
    """One by one, with the seed of the item; the score is the reward function's of the text."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = load(str(folder / "model"), str(folder / "adapter"), saved_config(str(folder / "adapter")))
    engine = RolloutEngine(model, tokenizer, max_num_seqs=1, max_prompt_length=100, max_response_length=MAX_TOKENS)
    found = items(whole)
    assert len(found) == ROWS * N
    rows = pd.read_parquet(folder / "questions.parquet")["prompt"]
    for (data, row, sample, window, max_tokens), item in found.items():
        assert (data, window, max_tokens) == ("questions", PTE["window"], MAX_TOKENS)
        prompt = tokenizer.apply_chat_template(list(rows[row]), add_generation_prompt=True, return_dict=False)
        sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=item_seed(0, row, sample))
        (output,) = engine.generate([prompt], sampling)
        assert item["text"] == tokenizer.decode(output.token_ids, skip_special_tokens=True)
        assert item["tokens"] == len(output.token_ids)
        for key in ("finish_reason", "num_evictions", "peak_cache_tokens"):
            assert item[key] == getattr(output, key)
        assert item["score"] == item["text"].count("a") % 2
    assert {item["finish_reason"] for item in found.values()} == {"stop", "length"}
    assert max(item["num_evictions"] for item in found.values()) >= 3
    cell = summary(whole)["cells"][0]
    assert cell["pass"]["1"]["mean"] == pytest.approx(sum(item["score"] for item in found.values()) / len(found))
    assert cell["truncated"] == sum(item["finish_reason"] == "length" for item in found.values()) / len(found)
    assert list(cell["pass"]) == ["1", "2", "3"]


def test_batches_do_not_matter(whole: Path, folder: Path, tmp_path: Path) -> None:
    for size in (1, 18):
        assert succeed(folder, tmp_path / str(size), with_adapter(folder), f"--max-num-seqs={size}") == items(whole)
        assert summary(tmp_path / str(size)) == summary(whole)
    other = succeed(folder, tmp_path / "seed", with_adapter(folder), "--seed=1")
    assert other.keys() == items(whole).keys()
    assert not {i["text"] for i in other.values()} & {i["text"] for i in items(whole).values()}


def test_math_is_graded_where_no_reward_is_given(folder: Path, tmp_path: Path) -> None:
    arguments_ = [a for a in arguments(folder, tmp_path / "out", with_adapter(folder)) if not a.startswith("--reward")]
    result = CliRunner().invoke(app, arguments_)
    assert result.exit_code == 0, result.output
    assert summary(tmp_path / "out")["cells"][0]["unparsed"] == 1.0, "random letters are no mathematics"
    assert {item["answer"] for item in items(tmp_path / "out").values()} == {None}


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_evaluation_ends_in_the_same_numbers(whole: Path, folder: Path, tmp_path: Path, graded: Path) -> None:
    """Killed twice, and a line that is half written."""
    output = tmp_path / "killed"
    log = output / "items.jsonl"
    for lines in (3, 8):
        command = [COMMAND, *arguments(folder, output, with_adapter(folder), "--max-num-seqs=1")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda lines=lines: log.exists() and log.read_bytes().count(b"\n") >= lines, process)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        assert not (output / "summary.json").exists()
    done = log.read_bytes().count(b"\n")
    assert 8 <= done < ROWS * N
    with log.open("ab") as file:
        file.write(b'{"data": "questions", "row": 5, "sa')
    graded.write_text("")
    result = run(folder, output, with_adapter(folder))
    assert result.exit_code == 0 and f"{done} of {ROWS * N} responses are there already" in result.output
    assert items(output) == items(whole)
    assert (output / "summary.json").read_text() == (whole / "summary.json").read_text()
    assert graded.read_text().count("\n") == ROWS * N - done, "what was there was graded again"


def test_ctrl_c_says_how_to_go_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = EvaluationFolder.add

    def stop_after_the_first(self, records) -> None:
        add(self, records)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationFolder, "add", stop_after_the_first)
        result = run(folder, tmp_path / "out", with_adapter(folder))
    assert result.exit_code == 130
    assert re.search(rf"stopped after [01] of {ROWS * N} responses; the same command goes on", result.output)
    assert len(items(tmp_path / "out")) == 1
    assert len(succeed(folder, tmp_path / "out", with_adapter(folder))) == ROWS * N


def test_a_finished_evaluation_is_only_summed_up(whole: Path, folder: Path, graded: Path) -> None:
    before = (whole / "items.jsonl").read_bytes()
    result = run(folder, whole, with_adapter(folder), "--k=2", "--max-num-seqs=1")
    assert result.exit_code == 0 and "numbers: " in result.output
    assert (whole / "items.jsonl").read_bytes() == before and graded.read_text() == ""
    assert list(summary(whole)["cells"][0]["pass"]) == ["1", "2"]
    assert run(folder, whole, with_adapter(folder)).exit_code == 0


def test_another_setting_is_refused(whole: Path, folder: Path, tmp_path: Path) -> None:
    other = write_data(tmp_path / "questions.parquet", rows=5)
    (tmp_path / "reward.py").write_text(REWARD + "# other\n")
    make_adapter(folder, tmp_path / "adapter", alpha=4.0)
    before = (whole / "items.jsonl").read_bytes()
    for changed, message in (
        ("--n=4", "--n 4: --output"),
        ("--max-tokens=50", "--max-tokens 50: .* with 60"),
        ("--window=16,full", "--window 16,full: .* with 16"),
        ("--temperature=0.5", "--temperature 0.5: "),
        ("--seed=1", "--seed 1: "),
        ("--dtype=bfloat16", "--dtype bfloat16: "),
        ("--no-text", "--text False: "),
        (f"--reward={tmp_path}/reward.py:vowels", "--reward vowels of reward.py, digest"),
        (f"--adapter={tmp_path}/adapter", "--adapter .*digest"),
        ("--baseline=window", "--adapter None: "),
    ):
        result = run(folder, whole, *([] if "--adapter" in changed else [with_adapter(folder)]), changed)
        assert result.exit_code == 2 and re.search(message, result.output.replace("\n", " ")), result.output
        assert "holds a run with" in result.output
    named = [a for a in arguments(folder, whole, with_adapter(folder)) if not a.startswith("--data")]
    result = CliRunner().invoke(app, [*named, f"--data={other}"])
    assert result.exit_code == 2 and "--data {'questions': '5 rows of digest" in result.output
    assert (whole / "items.jsonl").read_bytes() == before
