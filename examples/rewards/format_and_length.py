"""A reward for form and length: is the answer where it should be, is it right, and how long did it take.

    reward.custom_reward_function.path=examples/rewards/format_and_length.py
    reward.custom_reward_function.name=compute_score

A response has the form ``<think>...</think><answer>...</answer>``, once, with nothing behind it. The form earns
`format_share` of the reward. The rest is for an answer that is the ground truth: all of it up to `free` characters of
thought, then less along a straight line, down to `floor` of it at `most` characters and beyond.

Only right answers are paid by length: a penalty on wrong ones teaches to give up early. Characters, because a reward
function is given text. Whether an answer is right is equality of strings here; mathematics has verl_pte/rewards.
"""

import re
from typing import Any

_FORM = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    format_share: float = 0.1,
    free: int = 2000,
    most: int = 8000,
    floor: float = 0.5,
    **kwargs: Any,
) -> dict[str, float]:
    """Score one response. The named settings come from ``reward.custom_reward_function.reward_kwargs``.

    Returns ``score``, and for the log ``acc`` (right or not, whatever its length), ``formatted`` and ``thought``
    (characters). Raises ValueError for settings that cannot be.
    """
    if not 0 <= free < most:
        raise ValueError(f"free={free}, most={most}: must be 0 <= free < most, in characters of thought")
    if not (0 <= format_share <= 1 and 0 <= floor <= 1):
        raise ValueError(f"format_share={format_share}, floor={floor}: must be shares, in [0, 1]")
    # The tags are counted first: the form's pattern would take a second <think> for thought.
    found = _FORM.fullmatch(solution_str) if len(_TAG.findall(solution_str)) == 4 else None
    if found is None:
        return {"score": 0.0, "acc": 0.0, "formatted": 0.0, "thought": float(len(solution_str))}
    thought, answer = found[1].strip(), found[2].strip()
    right = float(answer == str(ground_truth).strip())
    beyond = min(max(len(thought) - free, 0) / (most - free), 1.0)
    score = format_share + (1 - format_share) * right * (1 - (1 - floor) * beyond)
    return {"score": score, "acc": right, "formatted": 1.0, "thought": float(len(thought))}
