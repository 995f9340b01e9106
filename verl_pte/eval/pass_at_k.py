"""pass@k: the chance that one of k samples is right, estimated without bias from n >= k samples of a question.

Of the C(n, k) ways to draw k of the n samples *without* replacement, those count that contain a right one. verl's
validation (`best@k`) draws with replacement instead, which may draw a sample twice: with n = k it gives
1 - (1 - c/n)^n where c > 0 of n right samples are certain to contain one.
"""

from collections.abc import Sequence
from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k) for c right samples of n. Raises ValueError unless 1 <= k <= n and 0 <= c <= n."""
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: must be in [1, n={n}]")
    if not 0 <= c <= n:
        raise ValueError(f"c={c}: must be in [0, n={n}]")
    return 1 - comb(n - c, k) / comb(n, k)


def best_of_k(scores: Sequence[float], k: int) -> float:
    """Expected best score of k of these samples, drawn without replacement: `pass_at_k` where scores are 0 and 1.

    The sample that i others do not exceed (ties broken by order) is the best of C(i, k - 1) of the C(n, k) draws.
    """
    n = len(scores)
    if all(score in (0, 1) for score in scores):
        return pass_at_k(n, round(sum(scores)), k)
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: must be in [1, n={n}]")
    return sum(score * (comb(i, k - 1) / comb(n, k)) for i, score in enumerate(sorted(scores)))


def powers_of_two(n: int) -> tuple[int, ...]:
    """1, 2, 4, ... below n, and n."""
    return (*(1 << i for i in range((n - 1).bit_length())), n)
