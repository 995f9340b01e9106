"""Which prompts, seeds and rates a step has."""

from collections import Counter

import pytest

from verl_pte.distill.plan import Plan


def test_a_plan() -> None:
    plan = Plan(num_prompts=7, batch_size=3, steps=20, lr=1.0, warmup_steps=4, seed=0)
    seen = [index for step in range(7) for index in plan.batch(step)]
    for round_ in range(3):
        assert sorted(seen[7 * round_ : 7 * round_ + 7]) == list(range(7)), "each prompt once a round"
    assert seen[:7] != seen[7:14]
    seeds = Counter(plan.answer_seed(step, i) for step in range(20) for i in range(3))
    assert max(seeds.values()) == 1
    other = Plan(num_prompts=7, batch_size=3, steps=20, lr=1.0, warmup_steps=4, seed=1)
    assert plan.answer_seed(0, 0) != other.answer_seed(0, 0)
    assert [other.batch(step) for step in range(4)] != [plan.batch(step) for step in range(4)]
    rates = [plan.learning_rate(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
