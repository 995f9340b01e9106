"""What ``verl-pte evaluate`` refuses, and the command of the documentation."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from evaluate_run import arguments, items, run, write_data
from transformers import AutoTokenizer
from typer.testing import CliRunner
from verl_run import make_model

from verl_pte.cli import app

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def wrong(folder: Path) -> Path:
    """Adapters, models and files that do not fit."""
    path = folder / "wrong"
    for name, changed in (("deep", {"num_hidden_layers": 3}), ("wide", {"hidden_size": 64})):
        make_model(path / name, initializer_range=0.3, **changed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = None
    make_model(path / "speechless")
    (path / "speechless" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(path / "speechless")
    write_data(path / "unanswered.parquet", reward_model={"style": "rule", "ground_truth": None})
    pd.DataFrame({"prompt": ["x"]}).to_parquet(path / "strings.parquet")
    (path / "broken.parquet").write_text("x")
    (path / "foreign").mkdir()
    (path / "foreign" / "thesis.txt").write_text("")
    return path


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model=nowhere/at/all", "--window=16"], "model=nowhere/at/all: no such directory"),
        (["--model={wrong}/speechless", "--window=16"], "no chat template"),
        ([], "--adapter DIR is missing; for the base model alone give --baseline full, or --baseline window"),
        (["--baseline=window"], "--adapter DIR is missing"),
        (["--baseline=full", "--window=16"], "--window: there is none with --baseline full"),
        (["--baseline=window", "--window=16,0"], "--window full: is no window for --baseline window"),
        (["--adapter={wrong}"], "has no adapter_config.json"),
        (
            ["--adapter={folder}/adapter", "--model={wrong}/wide"],
            "is .32, 4., and .* it is .64, 4.*or the base another one",
        ),
        (["--adapter={folder}/adapter", "--model={wrong}/deep"], "layers.2.* is missing, .* or the base another one"),
        (["--window=20"], "window=20: must be a multiple of block_size=16"),
        (["--window=16,16"], "--window: 16 is there twice"),
        (["--window=16", "--k=5"], r"--k 5: must be in \[1, --n 3\]"),
        (["--window=16", "--max-tokens=3k"], "--max-tokens 3k: must be a number from 1 on"),
        (["--window=16", "--max-tokens=100,1000"], "--max-tokens 1000: with the prompt of row .*positions: give fewer"),
        (["--window=16", "--dtype=int8"], "dtype=int8: must be one of"),
        (["--window=16", "--reward=nowhere.py:f"], "--reward nowhere.py:f: must be path.py:function"),
        (["--window=16", "--data=nowhere.parquet"], "--data nowhere.parquet: no such file, and no set of that name"),
        (["--window=16", "--data={folder}/questions.parquet"], "there are two of the name questions"),
        (["--window=16", "--data={wrong}/unanswered.parquet"], "must have a ground_truth"),
        (["--window=16", "--data={wrong}/strings.parquet"], "no column data_source"),
        (["--window=16", "--data={wrong}/broken.parquet"], "not a parquet file"),
        (["--window=16", "--output={wrong}/foreign"], "holds thesis.txt and no evaluation"),
        (["--window=16", "--", "--enforce-eager"], "vLLM's options need --engine vllm"),
    ],
)
def test_bad_input_ends_early_with_a_line(folder: Path, wrong: Path, more: list[str], message: str) -> None:
    result = run(folder, folder / "never", *(text.format(folder=folder, wrong=wrong) for text in more))
    assert result.exit_code == 2, (result.output, result.exception)
    assert re.search(message, " ".join(result.output.split())), result.output
    assert not (folder / "never").exists()


def test_grading_without_math_verify(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    asked = [a for a in arguments(folder, folder / "never", "--window=16") if not a.startswith("--reward")]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2 and "pip install 'verl-pte[eval]'" in result.output, result.output


def test_a_reward_that_fails_ends_the_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def f(**kwargs):\n    return 1 / 0\n")
    result = run(folder, tmp_path / "out", "--window=16", f"--reward={tmp_path}/reward.py:f")
    assert result.exit_code == 2 and "raised ZeroDivisionError" in result.output


def test_command_of_the_documentation_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, with a tiny model in place of the reader's."""
    block = re.search(r"^((?:    .*\n)+)", (ROOT / "docs" / "evaluation.md").read_text(), flags=re.M)[1]
    command = block.replace("\\\n", " ").replace("path/to/model", str(folder / "model"))
    program, *arguments_ = command.replace("path/to/adapter", str(folder / "adapter")).split()
    assert program == "verl-pte"
    write_data(tmp_path / "questions.parquet", rows=2)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments_)
    assert result.exit_code == 0, result.output
    assert len(items(tmp_path / "scores")) == 2 * 4 * 3 * 2
    written = re.findall(
        r"^      (\w[\w.]+)(?:, (\w[\w.]+))? ", (ROOT / "docs" / "evaluation.md").read_text(), flags=re.M
    )
    promised = {name for names in written for name in names if name}
    assert {path.name for path in (tmp_path / "scores").iterdir()} == promised
