"""Prompts from a parquet file, as token ids.

A column holds either conversations, lists of {role, content} as verl's data sets have them, which go through the
tokenizer's chat template, or plain strings, which are tokenized as they are. Answers, labels and all other columns are
not looked at.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Prompts:
    """Prompts that fit, in the file's order."""

    token_ids: list[list[int]]
    num_too_long: int

    def digest(self) -> str:
        """Says whether two runs have the same prompts."""
        return f"{len(self.token_ids)} of digest {hashlib.sha256(repr(self.token_ids).encode()).hexdigest()[:16]}"


def read_prompts(path: str, column: str, tokenizer: Any, max_prompt_length: int) -> Prompts:
    """The prompts of at most `max_prompt_length` tokens.

    Raises ValueError, saying what would be right, for a file without such a column, a row without a prompt and a
    tokenizer without chat template where one is needed; also if no prompt is left.
    """
    rows, conversations = _read(path, column)
    if conversations and tokenizer.chat_template is None:
        raise ValueError(
            f"--prompts {path}: column {column!r} holds conversations, and the model's tokenizer has no chat template; "
            "use an instruct model, or a column of plain strings"
        )
    fitting, num_too_long = [], 0
    for index, row in enumerate(rows):
        if conversations and row:
            token_ids = tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=False)
        else:
            token_ids = tokenizer(row).input_ids if row else []
        if not token_ids:
            raise ValueError(f"--prompts {path}: row {index} of column {column!r} is empty")
        if len(token_ids) <= max_prompt_length:
            fitting.append([int(t) for t in token_ids])
        else:
            num_too_long += 1
    if not fitting:
        raise ValueError(
            f"--max-prompt-length {max_prompt_length}: no prompt fits, all {num_too_long} of {path} are longer"
        )
    return Prompts(fitting, num_too_long)


def _read(path: str, column: str) -> tuple[Sequence[Any], bool]:
    """A column's values, and whether they are conversations."""
    if not Path(path).is_file():
        raise ValueError(f"--prompts {path}: no such file")
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"--prompts {path}: not a parquet file ({str(error).splitlines()[0]})") from None
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if column not in schema.names:
        raise ValueError(f"--prompt-column {column}: {path} has no such column; it has {found}")
    kind = schema.field(column).type
    if not (_is_text(kind) or _is_conversation(kind)):
        raise ValueError(
            f"--prompt-column {column}: must hold lists of {{role, content}} or strings; {path} has {found}"
        )
    rows = pq.read_table(path, columns=[column])[column].to_pylist()
    if not rows:
        raise ValueError(f"--prompts {path}: has no rows")
    return rows, _is_conversation(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_conversation(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    members = {field.name: field.type for field in kind.value_type}
    return all(_is_text(members.get(name, pa.null())) for name in ("role", "content"))
