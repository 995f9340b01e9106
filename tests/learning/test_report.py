"""What the learning benchmark says of its cells."""

import dataclasses
import json

import pytest
from learning_parts import small_cell

from verl_pte.bench.learning import report
from verl_pte.bench.learning.cells import run


def found_as(seed, reward, way="grpo"):
    """What a cell might have found: answers that end at a tenth of its seed; a reward for each block of steps."""
    cell = dataclasses.asdict(small_cell(seed=seed, way=way))
    answers = {"answer": 0.0, "chain": 1.0, "early": 0.0}, {"answer": seed / 10, "chain": 0.5, "early": seed / 4}
    return {
        "cell": cell,
        "base_digest": "one",
        "full_base": {"answer": 1.0, "chain": 1.0},
        "window_base": {"answer": 0.0, "chain": 0.0},
        "history": [{"step": 0, **answers[0]}, {"step": 9, **answers[1]}],
        "far": [],
        "curve": [{"reward": r} if way == "grpo" else {"loss": r} for r in reward],
    }


def test_summary_is_over_seeds() -> None:
    rewards = [0.0] * 6 + [0.4] * 4  # the last 20 steps are four blocks of five
    found = [found_as(1, rewards), found_as(3, [r / 2 for r in rewards]), found_as(1, [1.0], way="supervised")]
    rows = {row["way"]: row for row in report.summarize(found)}
    assert rows["grpo"]["seeds"] == [1, 3] and rows["supervised"]["seeds"] == [1]
    assert rows["grpo"]["answer"] == {"mean": pytest.approx(0.2), "half": pytest.approx(12.71 * 0.1)}
    assert rows["grpo"]["reward"]["mean"] == pytest.approx(0.3) and "reward" not in rows["supervised"]
    assert rows["grpo"]["early"] == pytest.approx(0.5) and rows["grpo"]["mismatch_max"] is None
    assert rows["grpo"]["rewards"][5:7] == [0.0, pytest.approx(0.3)]
    older = json.loads(json.dumps(found[0]))  # a cell of before there were these
    del older["cell"]["rewarded"], older["history"][1]["early"]
    (row,) = report.summarize([older, found[1]])
    assert row["seeds"] == [1, 3] and row["early"] is None and " | - | 0.500 " in report.markdown([row])
    longer = dataclasses.asdict(small_cell(works=(10, 48), seed=3))
    rows = report.summarize([found[2], found[2] | {"cell": longer}])
    assert [report.way(row) for row in rows] == ["supervised, 2 steps", "supervised, 2 steps on 10 to 48 steps of work"]


def test_report_says_where_seeds_have_different_bases(folder) -> None:
    found = [run(small_cell(seed=s), folder) for s in (0, 1)]
    same, mixed = found, [found[0], found[1] | {"base_digest": "another"}]
    assert " | PTE | 2 | " in report.markdown(report.summarize(same))
    assert " | PTE | 2, 2 bases | " in report.markdown(report.summarize(mixed))


def test_interval_is_students() -> None:
    assert report.interval([1.0, 2.0, 3.0]) == {"mean": 2.0, "half": pytest.approx(4.30 / 3**0.5)}
    assert report.interval([0.5]) == {"mean": 0.5, "half": None}
