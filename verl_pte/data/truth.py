r"""The answer a response is compared with, from what data sets keep in their columns.

The reward compares what a response has in ``\boxed{}`` with this text (verl_pte/rewards). So a ground truth is one that
can stand in a box, in a form the grader reads. Its value never changes: 27.0 becomes 27, 033 becomes 33, and 4.5e33,
which a grader of LaTeX takes for a product with Euler's number, becomes 4.5 \times 10^{33}.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from verl_pte.rewards.answer import final_answer

_WHOLE = re.compile(r"([+-]?)0*(\d+)(?:\.0+)?")
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]\+?(-?)0*(\d+)")
_DOLLAR = re.compile(r"(?<!\\)\$")
_BOX = re.compile(r"\\(?:boxed|fbox)\b")


def ground_truth(value: Any, several: bool = True) -> str | None:
    """The text of an answer: a string, a number, or a list of them.

    Of a list all elements count, or the first if the question has one answer (not `several`). None if there is no
    answer in it that a response could give.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        texts = [ground_truth(element) for element in (value if several else value[:1])]
        found = [text for text in dict.fromkeys(texts) if text is not None]
        return _boxable(", ".join(found)) if len(found) == len(set(texts)) else None
    if value is None or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if not isinstance(value, str | int | float):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return boxed(text) if _BOX.search(text) else _boxable(_plain(text))


def boxed(solution: Any) -> str | None:
    """What a worked solution ends in: its last box. None if there is no box."""
    if not isinstance(solution, str) or not _BOX.search(solution):
        return None
    answer = final_answer(solution)
    return None if answer is None else _boxable(_plain(answer))


def _plain(text: str) -> str:
    """Without dollar signs of math mode, and numbers in the form the grader reads."""
    text = _DOLLAR.sub("", text).strip()
    if match := _WHOLE.fullmatch(text):
        return match[1].replace("+", "") + match[2]
    if match := _SCIENTIFIC.fullmatch(text):
        return rf"{match[1]} \times 10^{{{match[2]}{match[3]}}}"
    return text


def _boxable(text: str) -> str | None:
    """`text`, if a response that boxes it is read as just that; braces that do not close are not."""
    return text if final_answer(rf"\boxed{{{text}}}") == text else None
