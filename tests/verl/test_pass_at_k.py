"""pass@k beside what verl's validation calls best@k: why the numbers differ."""

import numpy as np
import pytest
from verl.trainer.ppo.metric_utils import bootstrap_metric

from verl_pte.eval.pass_at_k import pass_at_k


@pytest.mark.parametrize(("n", "c"), [(4, 1), (16, 1), (16, 4)])
def test_verls_best_at_n_draws_with_replacement(n: int, c: int) -> None:
    """Of all n samples, c of them right, the best is right for certain. Drawn with replacement it may be missed."""
    scores = [1.0] * c + [0.0] * (n - c)
    ((best, _),) = bootstrap_metric(scores, subset_size=n, reduce_fns=[np.max], n_bootstrap=20_000)
    assert pass_at_k(n, c, n) == 1
    missed = (1 - c / n) ** n  # e.g. 0.36 for one right sample of 16
    assert best == pytest.approx(1 - missed, abs=0.015)
    ((one, _),) = bootstrap_metric(scores, subset_size=1, reduce_fns=[np.max], n_bootstrap=20_000)
    assert one == pytest.approx(pass_at_k(n, c, 1), abs=0.015), "for k = 1 there is nothing to draw twice"
