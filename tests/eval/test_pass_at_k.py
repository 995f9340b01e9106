"""pass@k and its intervals."""

import itertools
from math import comb

import numpy as np
import pytest

from verl_pte.eval.intervals import bootstrap_means, interval
from verl_pte.eval.pass_at_k import best_of_k, pass_at_k, powers_of_two


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),
        (4, 2, 2, 1 - 1 / 6),
        (4, 1, 4, 1.0),
        (4, 0, 4, 0.0),
        (5, 2, 3, 0.9),
        (10, 3, 5, 1 - 21 / 252),
        (16, 1, 8, 0.5),
        (16, 15, 2, 1.0),
    ],
)
def test_pass_at_k_of_hand_cases(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)
    assert pass_at_k(n, c, k) == 1 - comb(n - c, k) / comb(n, k)


def test_pass_at_k_counts_the_draws() -> None:
    """Of all ways to draw k of n samples, those with a right one; of other scores, the mean of the best."""
    for n, k in itertools.product(range(1, 8), range(1, 8)):
        if k > n:
            continue
        draws = list(itertools.combinations(range(n), k))
        for c in range(n + 1):
            hits = sum(any(i < c for i in draw) for draw in draws)
            assert pass_at_k(n, c, k) == pytest.approx(hits / len(draws), abs=1e-12)
            assert best_of_k([1.0] * c + [0.0] * (n - c), k) == pass_at_k(n, c, k)
        scores = [0.3, -1.0, 0.3, 2.0, 0.0, 1.0, 0.75][:n]
        best = np.mean([max(scores[i] for i in draw) for draw in draws])
        assert best_of_k(scores, k) == pytest.approx(best, abs=1e-12)


def test_pass_at_k_of_many_samples_is_finite() -> None:
    assert pass_at_k(4096, 1, 2048) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        pass_at_k(n, c, k)
    if k > n:
        with pytest.raises(ValueError, match="must be in"):
            best_of_k([0.5] * n, k)


def test_which_k() -> None:
    assert [powers_of_two(n) for n in (1, 2, 3, 4, 16, 17)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4),
        (1, 2, 4, 8, 16),
        (1, 2, 4, 8, 16, 17),
    ]


def test_an_interval_is_that_of_the_binomial() -> None:
    """Half of 400 rows right: a resampled mean has a standard deviation of 0.025."""
    values = np.array([[1.0, 0.0]] * 200 + [[0.0, 0.0]] * 200)
    low, high = interval(bootstrap_means(values, "set"))
    assert low[0] == pytest.approx(0.5 - 1.96 * 0.025, abs=0.003)
    assert high[0] == pytest.approx(0.5 + 1.96 * 0.025, abs=0.003)
    assert low[1] == high[1] == 0.0


def test_an_interval_covers_what_it_says() -> None:
    """Of 300 data sets of 60 questions, about 95 of 100 intervals hold the mean they were drawn with."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        low, high = interval(bootstrap_means(generator.random((60, 1)) < 0.4, "set", resamples=1000))
        held += low[0] <= 0.4 <= high[0]
    assert 0.90 <= held / 300 <= 0.98


def test_resampling_is_repeatable_and_paired() -> None:
    values = np.random.default_rng(0).random((30, 2))
    means = bootstrap_means(values, "a", resamples=500)
    assert np.array_equal(means, bootstrap_means(values, "a", resamples=500))
    assert not np.array_equal(means, bootstrap_means(values, "b", resamples=500))
    alone = bootstrap_means(values[:, 1:], "a", resamples=500)
    assert np.allclose(means[:, 1:], alone, atol=1e-12), "columns see the same rows"
    assert bootstrap_means(values[:1], "a", resamples=5).shape == (5, 2)
