r"""What an evaluation is made of: items and their seeds, settings, scores."""

from pathlib import Path

import pytest
from eval_parts import question, settings

from verl_pte import PTEConfig, RolloutOutput, SamplingParams
from verl_pte.eval.items import cut, item_seed
from verl_pte.eval.scoring import MathScorer, OwnScorer, Score
from verl_pte.eval.settings import parse_counts, parse_windows


def test_seeds_differ_by_run_row_and_sample() -> None:
    seeds = {item_seed(seed, row, sample) for seed in range(3) for row in range(20) for sample in range(20)}
    assert len(seeds) == 3 * 20 * 20
    assert item_seed(0, 1, 2) == item_seed(0, 1, 2)
    SamplingParams(seed=max(seeds))


def test_a_longer_budget_cuts_only_what_is_longer() -> None:
    schedule = PTEConfig(window=16, block_size=8).schedule()
    output = RolloutOutput(None, 0, list(range(30)), [0.0] * 30, "stop", 9, 99)
    assert cut(output, 30, 10, schedule) is output
    assert cut(output, 31, 10, schedule) is output
    part = cut(output, 29, 10, schedule)
    assert part.token_ids == list(range(29)) and part.finish_reason == "length"
    # 10 prompt tokens pin 16; with 28 thought tokens run, positions 32 and 40 would evict: 38 are there, once evicted.
    assert (part.num_evictions, part.peak_cache_tokens) == (1, 32)
    assert cut(output, 5, 10, schedule).peak_cache_tokens == 14
    assert cut(output, 29, 10, schedule.full()).peak_cache_tokens == 38


def test_lists() -> None:
    assert parse_windows(["768,1024", "0", "2048, full"]) == (768, 1024, None, 2048, None)
    assert parse_counts("max_tokens", ["3072,6144", "12288"]) == (3072, 6144, 12288)
    for text in ("", "-1", "3k", "1.5", "0"):
        with pytest.raises(ValueError, match=f"--max-tokens {text}: must be a number from 1 on"):
            parse_counts("max_tokens", [text])
    with pytest.raises(ValueError, match="--window x: must be"):
        parse_windows(["16,x"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 0}, "--n 0: must be at least 1"),
        ({"n": 4, "k": (1, 8)}, r"--k 8: must be in \[1, --n 4\]"),
        ({"n": 2, "temperature": 0.0}, "--n 2: with --temperature 0 all samples are the same"),
        ({"temperature": -1.0}, "--temperature -1.0: must be >= 0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_k": -1}, "--top-k -1"),
        ({"window": (16, 32, 16)}, "--window: 16 is there twice"),
        ({"window": (None, 32, None)}, "--window: full is there twice"),
        ({"max_tokens": (8, 8)}, "--max-tokens: 8 is there twice"),
    ],
)
def test_settings_refuse(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changed)


def test_which_k_are_computed() -> None:
    assert settings(n=6).ks == (1, 2, 4, 6)
    assert settings(n=6, k=(5,)).ks == (1, 5), "pass@1 always is"
    assert settings(n=6).identity() == settings(n=6, k=(5,)).identity()
    assert settings(window=(16, None)).identity()["window"] == "16,full"


def test_math_is_graded() -> None:
    scorer = MathScorer()
    assert scorer(question(truth="0.5"), r"so \boxed{\frac12}") == Score(r"\frac12", 1.0, False)
    assert scorer(question(), r"so \boxed{8}") == Score("8", 0.0, False)
    assert scorer(question(), "who knows") == Score(None, 0.0, True)


REWARD = """
def number(data_source, solution_str, ground_truth, extra_info):
    assert (data_source, ground_truth, extra_info) == ("source", "7", {"index": 0})
    return len(solution_str)

def facts(data_source, solution_str, ground_truth, extra_info):
    return {"score": -1.0, "acc": True, "pred": 3, "unparsed": 1.0}

def score_only(**kwargs):
    return {"score": 0.25}

def fails(**kwargs):
    raise KeyError("x")

def nothing(**kwargs):
    return None

not_callable = 1
"""


def test_scores_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text(REWARD)

    def score(name: str) -> Score:
        return OwnScorer(f"{path}:{name}")(question(), "four")

    assert score("number") == Score(None, 4.0, False)
    assert score("facts") == Score("3", 1.0, True), "acc is what verl's validation takes"
    assert score("score_only") == Score(None, 0.25, False)
    for name, message in (
        ("fails", r"raised KeyError\('x'\) for row 0"),
        ("nothing", "returned None for row 0; must be a number"),
        ("not_callable", "has no function not_callable"),
        ("missing", "has no function missing"),
    ):
        with pytest.raises(ValueError, match=message):
            score(name)
    for given in (str(path), f"{tmp_path}/none.py:number", f"{tmp_path}:number"):
        with pytest.raises(ValueError, match="must be path.py:function"):
            OwnScorer(given)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(ValueError, match="cannot be loaded"):
        OwnScorer(f"{tmp_path}/broken.py:number")
