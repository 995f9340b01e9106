"""Runs of ``verl-pte evaluate`` on a tiny model with a reward of its own, and what they leave."""

import json
import sys
from pathlib import Path

import pandas as pd
from typer.testing import CliRunner

from verl_pte.cli import app

COMMAND = Path(sys.executable).with_name("verl-pte")
ROWS, N, MAX_TOKENS = 6, 3, 60
REWARD = """
import os

def vowels(data_source, solution_str, ground_truth, extra_info):
    with open(os.environ["GRADED"], "a") as graded:
        graded.write(f"{extra_info['index']}\\n")
    return float(solution_str.count("a") % 2)
"""


def write_data(path: Path, rows: int = ROWS, **changed) -> Path:
    """Questions of verl's format."""
    row = {
        "data_source": "digits",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"},
    }
    prompts = [[{"role": "user", "content": f"{i} + {i * 7 % 10} = " + "?" * (i % 4)}] for i in range(rows)]
    made = [row | {"prompt": prompt, "extra_info": {"index": i}} | changed for i, prompt in enumerate(prompts)]
    pd.DataFrame(made).to_parquet(path)
    return path


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    named = {
        "model": folder / "model",
        "data": folder / "questions.parquet",
        "output": output,
        "n": N,
        "max-tokens": MAX_TOKENS,
        "max-num-seqs": 4,
        "reward": f"{folder}/reward.py:vowels",
        "dtype": "float32",
    }
    given = {text.partition("=")[0].removeprefix("--") for text in more} - {"data"}
    return ["evaluate", *(f"--{key}={value}" for key, value in named.items() if key not in given), *more]


def with_adapter(folder: Path) -> str:
    return f"--adapter={folder / 'adapter'}"


def run(folder: Path, output: Path, *more: str):
    return CliRunner().invoke(app, arguments(folder, output, *more))


def succeed(folder: Path, output: Path, *more: str) -> dict[tuple, dict]:
    result = run(folder, output, *more)
    assert result.exit_code == 0, result.output
    return items(output)


def items(output: Path) -> dict[tuple, dict]:
    """What is in items.jsonl, which holds no item twice."""
    lines = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    found = {tuple(line[key] for key in ("data", "row", "sample", "window", "max_tokens")): line for line in lines}
    assert len(found) == len(lines), "an item is there twice"
    return found


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())
