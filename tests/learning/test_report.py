"""What the learning benchmark says of its cells."""

import dataclasses
import json

import pytest
from learning_parts import small_cell

from verl_pte.bench.learning import paired, plots, report
from verl_pte.bench.learning.cells import run


def found_as(seed, reward, way="grpo", **settings):
    """What a cell might have found: answers that end at a tenth of its seed; a reward for each block of steps."""
    cell = dataclasses.asdict(small_cell(seed=seed, way=way, **settings))
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


def found_far(seed, answers, **settings):
    """What a cell might have found at so many tokens of thought, of which as many in a hundred answers were early."""
    tests = [
        {"work": length, "thought_length": length, "full_base_answer": 1.0, "answer": answer, "chain": 1.0}
        | {"early": length / 100}
        for length, answer in answers.items()
    ]
    return found_as(seed, [], way="supervised", **settings) | {"far": tests}


def test_answers_over_distance_are_means_over_seeds() -> None:
    rows = report.summarize(
        [
            found_far(0, {30: 0.2, 50: 0.1}),
            found_far(1, {30: 0.4}),  # has not the other test: neither has the row
            found_far(0, {30: 0.9}, task="tracking"),
            found_far(0, {60: 0.5}, knobs={"window": 8, "block_size": 2}),
        ]
    )
    (at,) = rows[0]["far"]
    assert at["answer"] == {"mean": pytest.approx(0.3), "half": pytest.approx(12.71 * 0.1)} and at["early"] == 0.3
    lookup, tracking = report.distances(rows).split("\n\n")
    assert lookup.splitlines()[0] == "| lookup | method | 30 | 60 |" and "PTE | 0.900 (0.30 early) |" in tracking
    assert "| PTE | 0.300 ± 1.271 (0.30 early) |  |" in lookup and "0.00 early" not in report.distances(rows)
    assert "| PTE (window 8, block_size 2) |  | 0.500 (0.60 early) |" in lookup
    panels = plots._distance(rows)
    assert list(panels) == [f"{task}: supervised, 2 steps" for task in ("lookup", "tracking")] + [
        "lookup: supervised, 2 steps, window 8, block_size 2"
    ]
    (axis,) = drawn(plots._over_distance, panels["lookup: supervised, 2 steps, window 8, block_size 2"])
    (bars,) = axis.containers  # of one seed, none to see
    assert bars.has_yerr and bars[2][0].get_segments()[0][:, 1].tolist() == [0.5, 0.5]
    lines = {line.get_label(): list(line.get_xdata()) for line in axis.get_lines()}
    assert lines["window"] == [8, 8] and lines["base, full cache"] == [60]
    (axis,) = drawn(plots._over_distance, panels["lookup: supervised, 2 steps"])
    assert axis.containers[0][2][0].get_segments()[0][:, 1] == pytest.approx([0.3 - 1.271, 0.3 + 1.271], abs=1e-3)


def drawn(draw, rows):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    draw(axis, rows, 16)
    plt.close(figure)
    return figure.axes


def test_reward_curves_are_means_with_the_range_over_seeds() -> None:
    found = [found_as(seed, [seed / 10, 0.5]) for seed in (1, 3)]
    found += [found_as(seed, [0.1, 0.1], method="lora_c") for seed in (1, 3)]
    (heading,) = panels = plots._rewards(report.summarize(found))
    assert heading.startswith("lookup: GRPO from scratch")
    (axis,) = drawn(plots._reward_curves, panels[heading])
    ours = next(line for line in axis.get_lines() if line.get_label() == "PTE")
    assert list(ours.get_xdata()) == [5, 10] and list(ours.get_ydata()) == pytest.approx([0.2, 0.5])
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.1) and band[:, 1].max() == pytest.approx(0.5)


def test_differences_are_seed_by_seed() -> None:
    ours = {s: found_as(s, [r] * 4, warm=9) for s, r in ((0, 0.5), (1, 0.6), (2, 0.9))}
    theirs = {s: found_as(s, [r] * 4, warm=9, method="lora_c") for s, r in ((1, 0.1), (2, 0.2), (3, 0.0))}
    unpaid = {s: found_as(s, [0.5] * 4, warm=9, rewarded=False) for s in (1, 2)}
    theirs[2]["history"][-1]["answer"] = 0.5
    others = [found_as(s, [0.0] * 4, warm=9, method="global_0") for s in (0, 1)]
    others[0]["base_digest"] = "another"  # leaves one pair
    literal = [found_as(s, [], way="supervised", method=m) for m in ("pte_literal", "pte_frobenius") for s in (1, 2)]
    failed = {"cell": dict(ours[0]["cell"], seed=3), "failure": "it did"}
    found = paired.differences([*ours.values(), failed, *theirs.values(), *unpaid.values(), *others, *literal])
    (of_update,) = (d for d in found if d.training == "supervised, 2 steps")
    assert of_update.what == "PTE, Frobenius - PTE, literal update" and of_update.answer["mean"] == 0
    (without,) = (d for d in found if "no reward" in d.training)
    assert (without.what, without.answer["mean"]) == ("PTE, after - before", pytest.approx(0.15))
    between = {d.what: d for d in found if "GRPO" in d.training and "no reward" not in d.training}
    assert between.keys() == {
        "PTE - LoRA_c", "PTE, with reward - without", "PTE, after - before", "LoRA_c, after - before",
        "#Global-0, after - before"
    }  # fmt: skip
    first = between["PTE - LoRA_c"]
    assert first.seeds == [1, 2] and first.task == "lookup"
    assert first.answer == {"mean": pytest.approx(-0.15), "half": pytest.approx(12.71 * 0.15)}
    assert first.reward == {"mean": pytest.approx(0.6), "half": pytest.approx(12.71 * 0.1)}
    assert between["PTE, with reward - without"].reward["mean"] == pytest.approx(0.25)
    gain = between["PTE, after - before"]
    assert gain.seeds == [0, 1, 2] and gain.answer["mean"] == pytest.approx(0.1) and gain.reward is None
    table = paired.markdown(found)
    assert "| PTE - LoRA_c | 2 | -0.150 ± 1.906 | 0.600 ± 1.271 |" in table
