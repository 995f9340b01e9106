"""verl's parquet files: five columns, written whole or not at all, and read with a look at what is in them.

    data_source   name of the set
    prompt        [{role, content}, ...], for the model's chat template
    ability       "math"
    reward_model  {style: "rule", ground_truth}, what the reward compares with
    extra_info    {split, index, id}: index counts the rows, id is the source's own or null

All sets have one schema, so that verl can put files beside each other.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_pte.data.problem import Problem
from verl_pte.data.prompt import PromptFormat
from verl_pte.data.sets import MathSet

COLUMNS = ("data_source", "prompt", "ability", "reward_model", "extra_info")


def verl_row(problem: Problem, index: int, found: MathSet, prompt: PromptFormat) -> dict[str, Any]:
    """A problem as verl's trainer and rewards take it."""
    return {
        "data_source": found.name,
        "prompt": prompt.messages(problem.text),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"split": found.split, "index": index, "id": problem.id},
    }


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a parquet file, which appears complete or, whatever happens, not at all; an older one is replaced."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema(
        {
            "data_source": text,
            "prompt": pa.list_(pa.struct({"role": text, "content": text})),
            "ability": text,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct({"split": text, "index": pa.int64(), "id": text}),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file in verl's format, whoever wrote it; of its columns the five.

    Raises ValueError naming the file, and what was found, for a file that is none or lacks a column, and for a row
    without prompt or ground truth.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        schema = pq.read_schema(path)
        missing = [name for name in COLUMNS if name not in schema.names]
        if missing:
            found = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise ValueError(f"{path}: no column {', '.join(missing)}; verl's rows need them, and it has {found}")
        rows = pq.read_table(path, columns=list(COLUMNS)).to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    if not rows:
        raise ValueError(f"{path}: has no rows")
    for number, row in enumerate(rows):
        _check(row, f"{path}, row {number}")
    return rows


def _check(row: Mapping[str, Any], where: str) -> None:
    messages, reward = row["prompt"], row["reward_model"]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise ValueError(f"{where}: prompt must be a list of {{role, content}} texts, it is {str(messages)[:200]}")
    truth = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    if truth is None or not str(truth).strip():
        raise ValueError(f"{where}: reward_model must have a ground_truth, it is {str(reward)[:200]}")
    if not row["data_source"]:
        raise ValueError(f"{where}: data_source must name the data set, it is {row['data_source']!r}")


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
