"""Bootstrap intervals of means over the rows of a data set.

Rows are drawn again with replacement, a row with all its samples at a time: what another choice of questions would have
given. Samples of one question are not drawn again, so the interval holds the chance of sampling only as far as it shows
between questions.

Shape suffixes: R rows, M means, B resamples.
"""

import numpy as np

RESAMPLES = 10_000
_AT_ONCE = 4_000_000  # drawn row numbers in memory


def bootstrap_means(values_RM: np.ndarray, name: str, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of resampled rows, float64 [B, M]. The draws depend on `name` and the number of rows alone.

    All M means see the same draws, so differences between them are paired.
    """
    rows = len(values_RM)
    generator = np.random.default_rng(list(name.encode()))
    means, step = [], max(1, _AT_ONCE // rows)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(rows, size=(count, rows)) + rows * np.arange(count)[:, None]
        times_BR = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)
        means.append(times_BR @ values_RM / rows)
    return np.concatenate(means)


def interval(means_BM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5th and the 97.5th percentile of each of M means."""
    low_M, high_M = np.quantile(means_BM, [0.025, 0.975], axis=0)
    return low_M, high_M
