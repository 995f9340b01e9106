"""``verl-pte evaluate --engine vllm`` beside the native engine, and with itself under another batch size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from chat_model import ENVIRONMENT, ChatModel, write_chat_model

COMMAND = Path(sys.executable).with_name("verl-pte")
FACTS = ("tokens", "finish_reason", "num_evictions", "peak_cache_tokens", "text")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> ChatModel:
    return write_chat_model(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.parquet"
    rows = [
        {
            "data_source": "letters",
            "prompt": [{"role": "user", "content": "Hello " + "there " * i}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "7"},
            "extra_info": {"index": i},
        }
        for i in range(4)
    ]
    pd.DataFrame(rows).to_parquet(path)
    return path


def evaluated(chat_model: ChatModel, data: Path, output: Path, engine: str, *more: str) -> dict[tuple, dict]:
    command = [COMMAND, "evaluate", f"--model={chat_model.base}", f"--adapter={chat_model.adapter}", f"--data={data}"]
    command += [f"--output={output}", f"--engine={engine}", "--dtype=float32", *more]
    command += ["--", "--enforce-eager"] if engine == "vllm" else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    return {(line["row"], line["sample"], line["window"], line["max_tokens"]): line for line in lines}


def test_greedy_responses_are_the_native_engines(chat_model: ChatModel, data: Path, tmp_path: Path) -> None:
    """Under two windows, each with an engine of its own, and two budgets."""
    asked = ("--temperature=0", "--window=32,64", "--max-tokens=50,120")
    native = evaluated(chat_model, data, tmp_path / "native", "native", *asked)
    vllm = evaluated(chat_model, data, tmp_path / "vllm", "vllm", *asked, "--max-num-seqs=3")
    assert len(native) == 4 * 2 * 2 and vllm.keys() == native.keys()
    assert {key: [item[name] for name in FACTS] for key, item in vllm.items()} == {
        key: [item[name] for name in FACTS] for key, item in native.items()
    }
    assert max(item["num_evictions"] for item in vllm.values()) > 5


def test_sampled_responses_are_those_of_their_seeds(chat_model: ChatModel, data: Path, tmp_path: Path) -> None:
    """One at a time and four at a time, and going on from half of the items."""
    asked = ("--n=3", "--max-tokens=40")
    one = evaluated(chat_model, data, tmp_path / "one", "vllm", *asked, "--max-num-seqs=1")
    assert len({item["text"] for item in one.values()}) == len(one) == 12
    lines = (tmp_path / "one" / "items.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "four").mkdir()
    (tmp_path / "four" / "settings.json").write_bytes((tmp_path / "one" / "settings.json").read_bytes())
    (tmp_path / "four" / "items.jsonl").write_text("".join(lines[:5]))
    assert evaluated(chat_model, data, tmp_path / "four", "vllm", *asked, "--max-num-seqs=4") == one
