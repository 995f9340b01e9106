"""pte/* metrics: right over micro-batches, mini-batches and the rows verl adds, and under their own names."""

import pytest
import torch
import verl  # noqa: F401  loads the plugin, and with it the patch
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.utils.py_functional import rename_dict

from verl_pte.verl.metrics import RolloutFacts, fold, mean_over_sequences


def test_rollout_facts_are_weighted_by_tokens_and_skip_padding():
    facts = RolloutFacts()
    reported = {"num_evictions": 3, "peak_cache_tokens": 20}
    one = {"log_probs": [torch.tensor([0.0, 0.0])], "response_masks": [torch.ones(2)], "cache_limits": [24]}
    facts.add(**one, rollout_log_probs=[torch.tensor([0.1, -0.3])], facts=[reported])
    facts.add(
        log_probs=[torch.zeros(4), torch.zeros(1)],
        rollout_log_probs=[torch.tensor([0.2, 0.2, 0.2, 9.0]), torch.tensor([5.0])],
        response_masks=[torch.tensor([1, 1, 1, 0]), torch.tensor([0])],  # masked tokens and a filled-in row
        facts=[{"num_evictions": 0, "peak_cache_tokens": 12}, {}],
        cache_limits=[32, 8],
    )
    assert facts.reduce(None, "cpu") == pytest.approx(
        {
            "pte/evictions_per_seq": 1.5,
            "pte/peak_cache_tokens": 20,
            "pte/cache_limit": 32,
            "pte/mismatch_mean": (0.1 + 0.3 + 3 * 0.2) / 5,
            "pte/mismatch_max": 0.3,
        }
    )


def test_the_rows_verl_adds_do_not_count_again():
    """Made by verl itself, from a row whose facts it copies."""
    row = {"prompts": torch.ones(3).long(), "responses": torch.ones(9).long(), "position_ids": torch.arange(12)}
    row |= {"response_mask": torch.ones(9), "extra_fields": {"num_evictions": 7, "peak_cache_tokens": 99}}
    padding, _ = construct_minimal_padding_template(row, {}, 0)
    assert padding["extra_fields"]["num_evictions"] == 7, "verl no longer copies them"
    facts = RolloutFacts()
    facts.add(
        log_probs=[torch.zeros(9), torch.zeros(1), torch.zeros(1)],
        rollout_log_probs=None,
        response_masks=[row["response_mask"], padding["response_mask"], torch.ones(1)],
        facts=[row["extra_fields"], padding["extra_fields"], {"num_evictions": 1, "peak_cache_tokens": 5}],
        cache_limits=[None] * 3,
    )
    assert facts.reduce(None, "cpu")["pte/evictions_per_seq"] == 4


def test_nothing_reported_is_not_zero():
    facts = RolloutFacts()
    facts.add(
        log_probs=[torch.zeros(2)],
        rollout_log_probs=None,
        response_masks=[torch.ones(2)],
        facts=[{}],
        cache_limits=[None],
    )
    assert facts.reduce(None, "cpu") == {}


def test_mean_over_sequences_ignores_batches_that_evicted_nothing():
    assert mean_over_sequences([1.0, float("nan"), 4.0], [3, 100, 1], None, "cpu") == pytest.approx(1.75)
    assert mean_over_sequences([float("nan")], [2], None, "cpu") is None


def test_a_maximum_stays_one_and_a_mean_a_mean_over_mini_batches():
    assert fold("pte/peak_cache_tokens", [10, 30, 20]) == 30
    assert fold("pte/mismatch_max", [1e-7, 3e-7]) == 3e-7
    assert fold("pte/mismatch_mean", [1.0, 3.0]) == 2.0


def test_names_reach_the_logger_as_they_are():
    renamed = rename_dict({"loss": [1.0], "actor/kl": [2.0], "pte/peak_cache_tokens": [10, 30]}, "actor/")
    assert renamed == {"actor/loss": [1.0], "actor/kl": [2.0], "pte/peak_cache_tokens": [30]}
