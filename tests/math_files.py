"""For the tests of the data sets: small files in the formats that the hub's sets have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_pte.data import PromptFormat

BARE = PromptFormat("{problem}")
STEP_BY_STEP = r"Please reason step by step, and put your final answer within \boxed{}."
DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=64)
    return path


def write_jsonl(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dapo_row(problem: str, answer: str, copy: int = 0) -> dict[str, Any]:
    """A row as BytedTsinghua-SIA/DAPO-Math-17k and AIME-2024 have it."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO_PROMPT.format(problem), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"{problem}, copy {copy}"},
    }


def dapo_rows(problems: int, copies: int) -> list[dict[str, Any]]:
    """`copies` of each problem, not side by side."""
    return [dapo_row(f"What is ${n} + 1$?", str(n + 1), copy) for copy in range(copies) for n in range(problems)]


def plain_rows(count: int, **more: Any) -> list[dict[str, Any]]:
    """`problem` and `answer`."""
    return [{"problem": f"What is ${n} + 1$?", "answer": str(n + 1), **more} for n in range(count)]


def olympiad_row(question: str, final_answer: list[str] | None, **more: Any) -> dict[str, Any]:
    """A row with OlympiadBench's columns."""
    return {
        "id": 1606,
        "question": question,
        "solution": ["It is so."],
        "final_answer": final_answer,
        "context": None,
        "image_1": None,
        "image_2": None,
        "modality": "Text-only",
        "is_multiple_answer": False,
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
    } | more
