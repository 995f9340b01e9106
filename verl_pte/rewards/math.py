"""Reward of a math answer: 1 if it equals the ground truth, 0 if not. verl's `custom_reward_function`.

    reward.custom_reward_function.path=pkg://verl_pte.rewards.math reward.custom_reward_function.name=compute_score

Equality is math-verify's: fractions, sets, intervals, units, LaTeX or plain. `unparsed` is returned beside the score,
so that a model that answers in the wrong form can be told from one that cannot reckon.
"""

from typing import Any

from verl_pte.rewards.answer import final_answer
from verl_pte.rewards.grader import Grader

_grader = Grader()


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """As verl calls it, from any thread.

    Returns ``score``, which is also ``acc``, and ``unparsed``: 1 where no answer was found or understood in time.
    """
    grade = _grader.grade(final_answer(solution_str), str(ground_truth))
    return {
        "score": grade.score,
        "acc": grade.score,
        "unparsed": float(grade.verdict in ("unparsed", "late")),
    }
