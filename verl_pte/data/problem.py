"""One raw row as a problem and its answer, whatever its columns are called.

Two kinds of rows are known. Plain ones have a column with the problem and one with the answer, or with a solution
whose box is the answer. verl's own have `prompt`, a list of messages in DAPO's wording, and `reward_model`. Names of
columns are compared without case. What a row lacks is a reason to leave it out (`Unusable`); columns that no row of
the source has are an error (`check_columns`).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from verl_pte.data.prompt import unwrapped
from verl_pte.data.truth import boxed, ground_truth

_PROBLEM = ("problem", "question", "prompt")
_ANSWER = ("answer", "final_answer", "label")
_ID = ("id", "unique_id", "problem_idx", "index")


class Problem(NamedTuple):
    """What is asked, and what is right."""

    text: str
    answer: str
    id: str | None  # the source's own


class Unusable(Exception):
    """Why a row is no problem: a few words that are the same for all such rows."""


def check_columns(row: Mapping[str, Any], source: str) -> None:
    """Raise ValueError, naming the columns found, if they hold no problem or no answer."""
    names = {name.lower() for name in row}
    has_answer = names & {*_ANSWER, "solution"} or "ground_truth" in _struct(_lower(row), "reward_model")
    for what, found, wanted in (
        ("problem", names & set(_PROBLEM), _PROBLEM),
        ("answer", has_answer, (*_ANSWER, "solution", "reward_model with a ground_truth")),
    ):
        if not found:
            raise ValueError(
                f"--source {source}: no column with the {what}; it has {', '.join(row) or 'none'}, and known are "
                f"{', '.join(wanted)}"
            )


def problem_of(row: Mapping[str, Any]) -> Problem:
    """Raises Unusable."""
    row = _lower(row)
    if row.get("modality", "Text-only") not in ("Text-only", None) or any(
        value for name, value in row.items() if name.startswith("image")
    ):
        raise Unusable("needs a picture")
    text = _problem(row)
    context = row.get("context")
    if isinstance(context, str) and context.strip():
        text = f"{context.strip()}\n\n{text}"
    answer = _answer(row)
    if answer is None:
        raise Unusable("no answer that can be boxed")
    return Problem(text, answer, _id(row))


def _problem(row: Mapping[str, Any]) -> str:
    value = next((row[name] for name in _PROBLEM if row.get(name)), None)
    if isinstance(value, str) and value.strip():
        return unwrapped(value) or value.strip()
    if not isinstance(value, list):
        raise Unusable("no problem")
    contents = [message.get("content") for message in value if isinstance(message, Mapping)]
    found = unwrapped(contents[0]) if len(contents) == 1 and isinstance(contents[0], str) else None
    if not found:
        # The problem cannot be told from the instruction around it, which would be asked beside ours.
        raise Unusable("prompt not in DAPO's wording")
    return found


def _answer(row: Mapping[str, Any]) -> str | None:
    several = row.get("is_multiple_answer") is not False
    candidates: Iterable[Any] = (
        _struct(row, "reward_model").get("ground_truth"),
        *(row.get(name) for name in _ANSWER),
    )
    for value in candidates:
        if (answer := ground_truth(value, several)) is not None:
            return answer
    return boxed(row.get("solution"))


def _id(row: Mapping[str, Any]) -> str | None:
    candidates = (*(row.get(name) for name in _ID), _struct(row, "extra_info").get("index"))
    return next((str(value) for value in candidates if value is not None), None)


def _struct(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = row.get(name)
    return value if isinstance(value, Mapping) else {}


def _lower(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name.lower(): value for name, value in row.items()}
