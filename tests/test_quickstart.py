"""The quickstart's own parts: task, reward function, what the model is taught, report. The run itself is in CI."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"


@pytest.fixture(autouse=True)
def _quickstart_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files import one another by name, as when run as scripts."""
    monkeypatch.syspath_prepend(str(QUICKSTART))
    yield
    for name in ("task", "reward", "make_model", "report"):
        sys.modules.pop(name, None)


@pytest.fixture
def reward():
    import reward

    return reward.compute_score


def test_solution_follows_from_the_question():
    import task

    problems = task.make_problems(50, seed=3)
    assert len({problem.question for problem in problems}) == 50
    for problem in problems:
        terms = problem.question.removesuffix(" sum mod 10?").split()
        assert task.MIN_TERMS <= len(terms) <= task.MAX_TERMS
        steps, answer = problem.solution.split("\n")
        total = 0
        for term, step in zip(terms, steps.split(), strict=True):
            total = (total + int(term[1])) % 10
            assert step == f"{term}={total}"
        assert answer == f"#### {total}" and problem.answer == str(total)


def test_hasty_solutions_stop_short():
    import task

    rng = random.Random(0)
    missed = set()
    for problem in task.make_problems(50, seed=4):
        steps, answer = task.hasty_solution(problem, rng).split("\n")
        assert problem.solution.startswith(steps + " ")
        assert answer == f"#### {steps[-1]}"
        missed.add(problem.question.count(" ") - 3 - steps.count(" "))
    assert missed == set(range(1, task.MAX_MISSED + 1))


def test_problems_follow_the_seed():
    import task

    assert task.make_problems(5, seed=1) == task.make_problems(5, seed=1)
    assert task.make_problems(5, seed=1) != task.make_problems(5, seed=2)


def test_every_step_reaches_less_far_back_than_the_window_keeps():
    """After an eviction W - C + 1 tokens are in sight; a step must not need more, or the task would be another one."""
    import task

    from verl_pte.core.schedule import Schedule

    schedule = Schedule(16, 0.25, 8)
    steps = task.make_problems(1, seed=0)[0].solution.split("\n")[0].split()
    assert max(map(len, steps)) + 1 <= schedule.window - schedule.chunk


def test_reward_pays_for_the_reference_solution(reward):
    import task

    for problem in task.make_problems(20, seed=5):
        assert reward("any", problem.solution, problem.answer) == 1.0
        wrong = str((int(problem.answer) + 1) % 10)
        assert reward("any", problem.solution, wrong) == 0.0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("a1=1 b2=3\n#### 3", 1.0),
        ("a9=5\n#### 3\n", 1.0),  # only the outcome counts
        ("a1=1 b2=3", 0.0),
        ("", 0.0),
        ("a1=1 b2=3\n#### ", 0.0),
        ("a1=1 b2=3 #### 3", 0.0),  # not a line of its own
        ("#### 3\nand more", 0.0),
        ("#### 3\n#### 4", 0.0),  # the last line is the answer
        ("#### 13", 0.0),
    ],
)
def test_reward_of(reward, response, score):
    assert reward("any", response, "3", extra_info={"split": "train", "index": 0}) == score


@pytest.fixture
def tokenizer():
    import make_model

    return make_model.make_tokenizer()


def test_tokenizer_is_byte_level_and_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "a1=1 b2=3\n#### 3"
    for one in (tokenizer, loaded):
        ids = one(text)["input_ids"]
        assert len(ids) == len(text) and one.decode(ids) == text
    assert len(loaded) == len(tokenizer)
    assert loaded.eos_token_id == tokenizer.eos_token_id != loaded.pad_token_id


def test_taught_mask_is_the_schedules(tokenizer):
    import make_model

    from verl_pte.core.schedule import Schedule

    schedule = Schedule(16, 0.25, 8)
    ids, mask, is_target, _ = make_model.make_batch(tokenizer, schedule, random.Random(0))
    prompt_len = int(is_target[0].int().argmax())
    last = int(is_target[0].nonzero().max())
    visible = (mask[0, 0, last] == 0).nonzero()[:, 0].tolist()
    assert visible == [key for key in range(last + 1) if schedule.is_visible(prompt_len, last, key)]
    assert len(visible) < last + 1  # something had left
    assert (
        ids[0, last] == tokenizer.eos_token_id
        and ids[0, prompt_len - 1 : prompt_len].tolist() == tokenizer("\n")["input_ids"]
    )


def test_lessons_are_whole_as_often_as_said(tokenizer):
    import make_model

    from verl_pte.core.schedule import Schedule

    rng = random.Random(1)
    schedule = Schedule(16, 0.25, 8)
    whole = torch.cat([make_model.make_batch(tokenizer, schedule, rng)[3] for _ in range(20)])
    assert whole.float().mean().item() == pytest.approx(1 - make_model.HASTY, abs=0.08)


def test_teaching_lowers_the_loss_and_stops_where_told(tokenizer, monkeypatch):
    import make_model

    from verl_pte.core.schedule import Schedule

    schedule = Schedule(16, 0.25, 8)
    monkeypatch.setattr(make_model, "BATCH_SIZE", 2)
    model = make_model.make_model(tokenizer, seed=0)

    def loss() -> float:
        ids, mask, is_target, _ = make_model.make_batch(tokenizer, schedule, random.Random(9))
        with torch.no_grad():
            log_probs = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
        chosen = log_probs.gather(2, ids[:, 1:, None])[..., 0]
        return -chosen[is_target[:, 1:]].mean().item()

    start = loss()
    make_model.pretrain(model, tokenizer, schedule, max_steps=8, stop_at=1.0, seed=0)
    assert loss() < start - 0.1
    assert (
        make_model.pretrain(model, tokenizer, schedule, max_steps=50, stop_at=-1.0, seed=0) < 1.0
    )  # one step, then out


def test_rows_have_verls_columns():
    import make_model
    import task

    problems = task.make_problems(3, seed=0)
    for index, (row, problem) in enumerate(zip(make_model.to_rows(problems, "val"), problems, strict=True)):
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        assert row["prompt"] == [{"role": "user", "content": problem.question}]
        assert row["reward_model"] == {"style": "rule", "ground_truth": problem.answer}
        assert row["extra_info"] == {"split": "val", "index": index}


def _step(reward: float, mismatch: float = 1e-6, peak: float = 88, length: float = 70) -> dict[str, float]:
    return {
        "critic/score/mean": reward,
        "pte/mismatch_max": mismatch,
        "pte/peak_cache_tokens": peak,
        "pte/evictions_per_seq": 6.0,
        "response_length/mean": length,
    }


def _write(path: Path, steps: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps({"step": i + 1, "data": data}) + "\n" for i, data in enumerate(steps)))


def test_summary_holds_what_the_log_says(tmp_path):
    import report

    rewards = [0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9]
    _write(
        tmp_path / "metrics.jsonl",
        [_step(reward, mismatch=reward * 1e-6, peak=80 + i) for i, reward in enumerate(rewards)],
    )
    summary = report.summarize(report.read_metrics(tmp_path / "metrics.jsonl"), limit=88, window=16, seconds=12.34)
    assert summary == {
        "steps": 7,
        "reward_first": pytest.approx(0.2),
        "reward_last": pytest.approx(0.8),
        "mismatch_max": pytest.approx(0.9e-6),
        "peak_cache_tokens": 86,
        "cache_limit": 88,
        "window": 16,
        "mean_response_length": pytest.approx(70),
        "seconds": 12.3,
    }


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mismatch": 2e-4}, "mismatch_max"),
        ({"mismatch": float("nan")}, "mismatch_max"),
        ({"peak": 89}, "peak_cache_tokens"),
        ({"length": 47}, "mean_response_length"),
    ],
)
def test_a_broken_bound_is_named(change, word):
    import report

    summary = report.summarize([{"step": 1, **_step(0.5, **change)}], limit=88, window=16, seconds=1.0)
    assert [violation.split()[0] for violation in report.violations(summary, None)] == [word]


def test_the_rise_is_demanded_only_when_asked_for():
    import report

    summary = report.summarize(
        [{"step": i, **_step(0.4 + 0.02 * i)} for i in range(6)], limit=88, window=16, seconds=1.0
    )
    assert report.violations(summary, None) == []
    assert report.violations(summary, 0.05) == []
    assert "rose by 0.060" in report.violations(summary, 0.15)[0]


def test_metrics_without_pte_are_refused(tmp_path):
    import report

    incomplete = _step(0.5)
    del incomplete["pte/mismatch_max"]
    _write(tmp_path / "metrics.jsonl", [incomplete])
    with pytest.raises(ValueError, match="step 1 .* has no pte/mismatch_max"):
        report.read_metrics(tmp_path / "metrics.jsonl")
    _write(tmp_path / "metrics.jsonl", [{"val-core/acc": 0.1}])
    with pytest.raises(ValueError, match="no training step"):
        report.read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(("mismatch", "code"), [(1e-6, 0), (1e-3, 1)])
def test_report_writes_everything_and_fails_on_a_broken_bound(tokenizer, tmp_path, monkeypatch, capsys, mismatch, code):
    import make_model
    import pandas as pd
    import report
    import task

    from verl_pte.core.schedule import Schedule

    problems = task.make_problems(20, seed=0)
    pd.DataFrame(make_model.to_rows(problems, "train")).to_parquet(tmp_path / "train.parquet")
    tokenizer.save_pretrained(tmp_path / "model")
    _write(tmp_path / "metrics.jsonl", [_step(0.3 + 0.1 * i, mismatch=mismatch) for i in range(6)])
    monkeypatch.setattr(sys, "argv", ["report.py", "--out", str(tmp_path), "--min-rise", "0.15"])
    assert report.main() == code
    summary = json.loads((tmp_path / "summary.json").read_text())
    longest = max(len(make_model.encode(tokenizer, problem, problem.solution)[0]) for problem in problems)
    assert summary["cache_limit"] == Schedule(16, 0.25, 8).cache_limit(longest)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert ("mismatch_max" in capsys.readouterr().err) == bool(code)
