"""Questions: rows of data sets as token ids, with what their answers are graded against.

Prompts go through the tokenizer's chat template with the generation prompt, as verl's rollouts do. No row is left out:
one that does not fit is an error, because a score over the other rows would be a score of another data set.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Question(NamedTuple):
    """One row of a data set."""

    data: str  # name of the data set
    row: int  # from 0
    prompt: list[int]
    ground_truth: Any
    data_source: str
    extra_info: Mapping[str, Any]


def data_files(given: Iterable[str], prepared: Path) -> dict[str, Path]:
    """Name -> parquet file of what ``--data`` names: a file, or a set of `verl_pte.data.SETS`.

    A set that is not in the folder `prepared` yet is written there, from the hub. Raises ValueError for other names,
    and for two of the same; RuntimeError if the hub fails.
    """
    from verl_pte.data import SETS, prepare

    found: dict[str, Path] = {}
    for text in given:
        known = text in SETS
        name, path = (text, prepared / f"{text}.parquet") if known else (Path(text).stem, Path(text))
        if name in found:
            raise ValueError(f"--data {text}: there are two of the name {name}; results are told apart by it")
        if known and not path.is_file():
            prepare(text, path)
        elif not path.is_file():
            raise ValueError(f"--data {text}: no such file, and no set of that name; sets are {', '.join(SETS)}")
        found[name] = path
    return found


def read_questions(name: str, path: Path, tokenizer: Any) -> list[Question]:
    """All rows of a parquet file. Raises ValueError for one that cannot be asked or graded."""
    from verl_pte.data import read_rows

    questions = []
    for row, fields in enumerate(read_rows(path)):
        prompt = tokenizer.apply_chat_template(fields["prompt"], add_generation_prompt=True, return_dict=False)
        truth, extra = fields["reward_model"]["ground_truth"], fields["extra_info"] or {}
        questions.append(Question(name, row, [int(t) for t in prompt], truth, fields["data_source"], extra))
    return questions


def check_positions(questions: Iterable[Question], max_tokens: int, max_positions: int) -> None:
    """Raise ValueError unless the longest prompt and response fit the model's positions."""
    longest = max(questions, key=lambda question: len(question.prompt))
    if len(longest.prompt) + max_tokens > max_positions:
        raise ValueError(
            f"--max-tokens {max_tokens}: with the prompt of row {longest.row} of {longest.data}, {len(longest.prompt)} "
            f"tokens, it exceeds the model's max_position_embeddings={max_positions}. A window bounds the cache, not "
            "the positions: give fewer tokens, or a base model with more positions"
        )


def digest(questions: Iterable[Question]) -> str:
    """Says whether two runs ask the same questions and grade against the same truths."""
    found = hashlib.sha256()
    count = 0
    for question in questions:
        found.update(repr((question.prompt, question.ground_truth, question.data_source, question.extra_info)).encode())
        count += 1
    return f"{count} rows of digest {found.hexdigest()[:16]}"
