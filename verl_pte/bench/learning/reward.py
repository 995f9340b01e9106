"""The tasks' outcome reward as verl's ``reward.custom_reward_function``: how much of the answer is right.

verl loads this file by its path.
"""

import json
from typing import Any

from verl_pte.bench.learning.tasks import Example, Task
from verl_pte.bench.learning.words import tokens


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> float:
    """Score one response, the words of its tokens."""
    kind, *example = json.loads(ground_truth)
    return Task(kind).score(Example(*example), tokens(solution_str)).answer
