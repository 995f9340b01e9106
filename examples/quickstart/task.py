"""The quickstart's generated task: a running sum modulo 10, reasoned through step by step.

A problem lists labelled digits, ``a3 b1 c4 ... sum mod 10?``. Its worked solution names one term after the other with
the total so far, ``a3=3 b1=4 c4=8 ...``, and ends with the answer the way GSM8K writes it, ``#### 8``. A step needs the
prompt (pinned in the cache) and the step before it (five characters back), nothing older: a policy whose window is far
shorter than the solution can still be right. That is the point, and the limit, of this task; one that needs memory
beyond the window is another matter.

Shared by `make_model.py` (which teaches it and writes the parquet files) and `reward.py` (which only knows the
answer line).
"""

import random
import string
from dataclasses import dataclass

MIN_TERMS, MAX_TERMS = 12, 14
MAX_DIGIT = 4  # small addends: a tiny model learns the addition table in seconds
MAX_MISSED = 4  # terms a hasty solution leaves out at most
ANSWER_MARK = "####"


@dataclass(frozen=True)
class Problem:
    """One question, its worked solution and the answer the reward looks for."""

    question: str
    solution: str
    answer: str


def make_problem(rng: random.Random) -> Problem:
    """Draw a problem; the same state of `rng` gives the same problem."""
    digits = [rng.randint(0, MAX_DIGIT) for _ in range(rng.randint(MIN_TERMS, MAX_TERMS))]
    labels = string.ascii_lowercase[: len(digits)]
    question = " ".join(f"{label}{digit}" for label, digit in zip(labels, digits, strict=True)) + " sum mod 10?"
    total, steps = 0, []
    for label, digit in zip(labels, digits, strict=True):
        total = (total + digit) % 10
        steps.append(f"{label}{digit}={total}")
    return Problem(question, " ".join(steps) + f"\n{ANSWER_MARK} {total}", str(total))


def hasty_solution(problem: Problem, rng: random.Random) -> str:
    """A solution that gives up 1 to `MAX_MISSED` terms early and passes the sum so far off as the answer."""
    steps = problem.solution.split("\n")[0].split()
    steps = steps[: len(steps) - rng.randint(1, MAX_MISSED)]
    return " ".join(steps) + f"\n{ANSWER_MARK} {steps[-1][-1]}"


def make_problems(count: int, seed: int) -> list[Problem]:
    """`count` problems from one seed."""
    rng = random.Random(seed)
    return [make_problem(rng) for _ in range(count)]
