"""What a response is worth: the math grader, or a function of the user's with verl's signature.

The grader runs in processes that are killed when they are late (verl_pte/rewards/grader.py). A user's function runs in
threads of this process, as verl runs it, and nothing ends it.
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from verl_pte.eval.questions import Question
from verl_pte.rewards.answer import final_answer
from verl_pte.rewards.grader import Grader

PROCESSES = 2  # responses graded at once


class Score(NamedTuple):
    """Of one response."""

    answer: str | None
    score: float
    unparsed: bool


class Scorer(Protocol):
    """Scores responses, from several threads at once."""

    def __call__(self, question: Question, text: str) -> Score: ...


class MathScorer:
    """Grades the final answer against the ground truth: 1 or 0. Raises ValueError where math-verify is missing."""

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "math-verify is missing, which grades mathematics: pip install 'verl-pte[eval]', or give --reward "
                "path.py:function"
            )
        self._grader = Grader(PROCESSES)

    def __call__(self, question: Question, text: str) -> Score:
        answer = final_answer(text)
        grade = self._grader.grade(answer, str(question.ground_truth))
        return Score(answer, grade.score, grade.verdict in ("unparsed", "late"))


class OwnScorer:
    """Calls ``path.py:function`` as verl calls ``compute_score``.

    The function returns a number, or a dict with `score`; of a dict `acc` is taken where it is there, as verl's
    validation does, `pred` is the answer, and `unparsed` says that there was none. Raises ValueError for a function
    that cannot be had, and, when called, for one that raises or returns something else.
    """

    def __init__(self, given: str) -> None:
        self.given = given
        path, colon, name = given.rpartition(":")
        if not colon or not Path(path).is_file():
            raise ValueError(f"--reward {given}: must be path.py:function, and the file must be there")
        spec = importlib.util.spec_from_file_location("evaluate_reward", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"--reward {given}: {path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"--reward {given}: {path} cannot be loaded ({error!r})") from error
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"--reward {given}: {path} has no function {name}")
        self._function: Callable[..., Any] = function

    def __call__(self, question: Question, text: str) -> Score:
        try:
            found = self._function(
                data_source=question.data_source,
                solution_str=text,
                ground_truth=question.ground_truth,
                extra_info=dict(question.extra_info),
            )
        except Exception as error:
            raise ValueError(f"--reward {self.given}: raised {error!r} for row {question.row}") from error
        facts = found if isinstance(found, dict) else {"score": found}
        value = facts.get("acc", facts.get("score"))
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(
                f"--reward {self.given}: returned {found!r} for row {question.row}; must be a number, or a dict with "
                "`score`"
            )
        answer = facts.get("pred")
        return Score(None if answer is None else str(answer), float(value), bool(facts.get("unparsed", False)))


def reward_digest(given: str | None) -> str | None:
    """Says whether two runs score alike, as far as the file says."""
    if given is None:
        return None
    path, _, name = given.rpartition(":")
    return f"{name} of {Path(path).name}, digest {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
