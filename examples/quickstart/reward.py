"""The quickstart's reward: 1 if the answer line is there and right, else 0. An example of a custom reward
function.

verl loads this file by path and calls the function once for every response:

    reward.custom_reward_function.path=examples/quickstart/reward.py reward.custom_reward_function.name=compute_score

`data_source`, `ground_truth` and `extra_info` are the columns of the parquet file
(`reward_model.ground_truth`). Only the outcome counts: no credit for the steps, and none for a right answer
that does not end the response.
"""

import re
from typing import Any

_ANSWER_LINE = re.compile(r"^#### (\d)\s*\Z", re.MULTILINE)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> float:
    """Score one response (the decoded text after the prompt, special tokens removed)."""
    found = _ANSWER_LINE.search(solution_str)
    return float(found is not None and found.group(1) == ground_truth)
