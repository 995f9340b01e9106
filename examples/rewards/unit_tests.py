"""A reward in the manner of unit tests, for answers that can be right in many ways: a plan, a set, a table.

    reward.custom_reward_function.path=examples/rewards/unit_tests.py
    reward.custom_reward_function.name=compute_score

The answer is JSON, in the last ```` ```json ```` block of the response. The row's ground truth is a list of assertions
on it, as a JSON string. Each names a place in the answer, what is asked of it, and a value:

    [{"at": [], "is": "type", "value": "object"},
     {"at": ["items"], "is": "length", "value": 3},
     {"at": ["items"], "is": "sum", "value": 12},
     {"at": ["items", 0], "is": "at_least", "value": 1}]

Nothing that a model writes is executed: an assertion is data, and what it may ask is in CHECKS. An answer that is no
JSON, or a very long one, fails them all. An assertion that cannot be read is a mistake in the data and raises
ValueError, which ends the run.
"""

import json
from collections.abc import Callable
from typing import Any

_LONGEST = 20_000  # characters of an answer: bounds what any check can cost
_TYPES = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int, "boolean": bool}

# What an assertion may ask: whether `found`, in the answer, is as `value`, in the row, wants it. One that does not fit
# what was found (the length of a number, say) raises, and counts as failed.
CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "type": lambda found, value: isinstance(found, _TYPES[value]) and isinstance(found, bool) == (value == "boolean"),
    "equals": lambda found, value: _text(found) == _text(value),
    "one_of": lambda found, value: _text(found) in map(_text, value),
    "length": lambda found, value: len(found) == value,
    "at_least": lambda found, value: _number(found) >= value,
    "at_most": lambda found, value: _number(found) <= value,
    "contains": lambda found, value: value in found,
    "sorted": lambda found, value: (found == sorted(found)) == value,
    "unique": lambda found, value: (len(set(map(_text, found))) == len(found)) == value,
    "sum": lambda found, value: sum(map(_number, found)) == value,
}


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    partial: float = 0.0,
    **kwargs: Any,
) -> dict[str, float]:
    """Score one response: 1 if every assertion holds, else `partial` times the share of those that do.

    `partial` comes from ``reward.custom_reward_function.reward_kwargs``. Returns ``score``, and for the log ``acc``
    (all hold), ``passed`` (the share) and ``parsed`` (there was JSON to look at).
    """
    assertions = _assertions(ground_truth)
    try:
        answer = _answer(solution_str)
    except (ValueError, RecursionError):  # no JSON, or nested too deep
        return {"score": 0.0, "acc": 0.0, "passed": 0.0, "parsed": 0.0}
    passed = sum(_holds(answer, assertion) for assertion in assertions) / len(assertions)
    return {
        "score": 1.0 if passed == 1 else partial * passed,
        "acc": float(passed == 1),
        "passed": passed,
        "parsed": 1.0,
    }


def _assertions(ground_truth: str) -> list[dict[str, Any]]:
    """The row's assertions. Raises ValueError if they cannot be read."""
    assertions = json.loads(ground_truth)
    if not isinstance(assertions, list) or not assertions:
        raise ValueError(f"ground_truth={ground_truth!r}: must be a JSON list of at least one assertion")
    for assertion in assertions:
        if not isinstance(assertion, dict) or set(assertion) != {"at", "is", "value"}:
            raise ValueError(f"assertion {assertion!r}: must have the keys at, is and value")
        if assertion["is"] not in CHECKS:
            raise ValueError(f"assertion {assertion!r}: is must be one of {', '.join(CHECKS)}")
        if assertion["is"] == "type" and assertion["value"] not in _TYPES:
            raise ValueError(f"assertion {assertion!r}: value must be one of {', '.join(_TYPES)}")
    return assertions


def _answer(response: str) -> Any:
    """What the last JSON block says. Raises ValueError or RecursionError if there is none that can be read."""
    block, lines = None, None  # the last whole block; the lines of the one that is open
    for line in response.split("\n"):
        if line.rstrip() == "```json":
            lines = []
        elif line.rstrip() == "```" and lines is not None:
            block, lines = "\n".join(lines), None
        elif lines is not None:
            lines.append(line)
    if block is None or len(block) > _LONGEST:
        raise ValueError("no answer")
    return json.loads(block, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")  # Python's parser takes NaN, which equals nothing, and Infinity


def _holds(answer: Any, assertion: dict[str, Any]) -> bool:
    try:
        for key in assertion["at"]:
            answer = answer[key]
        return bool(CHECKS[assertion["is"]](answer, assertion["value"]))
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError):
        return False


def _text(value: Any) -> str:
    """Equal for equal JSON: in Python True equals 1."""
    return json.dumps(value, sort_keys=True)


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("no number")
    return value
