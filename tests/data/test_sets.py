r"""Math data sets: rows of every known format, copies, answers and counts."""

import math
from pathlib import Path

import pytest
from math_files import (
    BARE,
    DAPO_PROMPT,
    STEP_BY_STEP,
    dapo_row,
    dapo_rows,
    olympiad_row,
    plain_rows,
    write_jsonl,
    write_parquet,
)

from verl_pte.data import FAMILIES, SETS, PromptFormat, prepare, read_rows
from verl_pte.data.truth import boxed, ground_truth


def prepared_rows(name: str, source: Path, folder: Path, prompt: PromptFormat = BARE) -> list[dict]:
    return read_rows(prepare(name, folder, source=str(source), prompt=prompt, allow_any_count=True).path)


def asked_and_answered(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["prompt"][-1]["content"], row["reward_model"]["ground_truth"]) for row in rows]


def test_a_row_has_verls_columns(tmp_path):
    source = write_jsonl(plain_rows(500, unique_id="test/algebra/1.json", level=3), tmp_path / "test.jsonl")
    prepared = prepare("math-500", tmp_path / "new" / "data", source=str(source))
    assert prepared.path == tmp_path / "new" / "data" / "math-500.parquet"
    assert (prepared.read, prepared.duplicates, prepared.dropped, prepared.written) == (500, 0, {}, 500)
    rows = read_rows(prepared.path)
    assert rows[7] == {
        "data_source": "math-500",
        "prompt": [{"role": "system", "content": STEP_BY_STEP}, {"role": "user", "content": "What is $7 + 1$?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "8"},
        "extra_info": {"split": "test", "index": 7, "id": "test/algebra/1.json"},
    }
    assert [row["extra_info"]["index"] for row in rows] == list(range(500))


def test_dapo_loses_its_copies_and_its_wording(tmp_path):
    source = write_parquet(dapo_rows(problems=30, copies=5), tmp_path / "dapo.parquet")
    prepared = prepare("dapo-math-17k", tmp_path, source=str(source), prompt=BARE, allow_any_count=True)
    assert (prepared.read, prepared.duplicates, prepared.dropped, prepared.written) == (150, 120, {}, 30)
    rows = read_rows(prepared.path)
    assert asked_and_answered(rows) == [(f"What is ${n} + 1$?", str(n + 1)) for n in range(30)]
    assert rows[3]["extra_info"] == {"split": "train", "index": 3, "id": "What is $3 + 1$?, copy 0"}


def test_dapos_wording_can_be_kept_to_the_letter(tmp_path):
    source = dapo_rows(problems=3, copies=2)
    rows = prepared_rows("dapo-math-17k", write_parquet(source, tmp_path / "s.parquet"), tmp_path, FAMILIES["dapo"])
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in source[:3]]


def test_copies_that_disagree_take_the_problem_out(tmp_path):
    source = [dapo_row("a?", "1"), dapo_row("b?", "2"), dapo_row("a?", "7"), dapo_row("a?", "1"), dapo_row("b?", "2.0")]
    path = write_parquet(source, tmp_path / "s.parquet")
    prepared = prepare("dapo-math-17k", tmp_path, source=str(path), prompt=BARE, allow_any_count=True)
    assert asked_and_answered(read_rows(prepared.path)) == [("b?", "2")]
    assert prepared.dropped == {"copies with different answers": 1}
    assert prepared.read == prepared.duplicates + 1 + prepared.written == 5


def test_a_benchmark_keeps_problems_that_read_alike(tmp_path):
    """Published counts are of rows; only files known to repeat problems lose copies."""
    twice = write_jsonl([*plain_rows(271), *plain_rows(1)], tmp_path / "test.jsonl")
    assert prepare("minerva-math", tmp_path, source=str(twice)).written == 272


def test_verls_own_aime_file_holds_each_problem_32_times(tmp_path):
    source = write_parquet(dapo_rows(problems=30, copies=32), tmp_path / "aime-2024.parquet")
    prepared = prepare("aime-2024", tmp_path / "data", source=str(source))
    assert (prepared.read, prepared.duplicates, prepared.written) == (960, 930, 30)


def test_other_formats_of_dapo(tmp_path):
    """A deduplicated copy whose prompt is the bare problem, one that asks for a box, and one without messages."""
    processed = {"prompt": "a?", "solution": "34", "reward_model": {"ground_truth": "34", "style": "rule"}}
    asks_for_box = {
        "prompt": [
            {
                "role": "user",
                "content": DAPO_PROMPT.format("b?").replace("$Answer (without quotes)", r"\boxed{$Answer}"),
            }
        ],
        "label": "35",
    }
    as_text = {"prompt": DAPO_PROMPT.format("c?"), "answer": 36}
    for row, expected in ((processed, ("a?", "34")), (asks_for_box, ("b?", "35")), (as_text, ("c?", "36"))):
        source = write_jsonl([row], tmp_path / "s.jsonl")
        assert asked_and_answered(prepared_rows("dapo-math-17k", source, tmp_path)) == [expected]


def test_a_prompt_in_unknown_words_is_not_asked(tmp_path):
    strange = dapo_row("x", "1") | {"prompt": [{"role": "user", "content": "Solve this, my friend: 1+1"}]}
    source = write_jsonl([strange, dapo_row("b?", "2")], tmp_path / "s.jsonl")
    prepared = prepare("dapo-math-17k", tmp_path, source=str(source), prompt=BARE, allow_any_count=True)
    assert prepared.dropped == {"prompt not in DAPO's wording": 1} and prepared.written == 1


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "q", "answer": "204"}, "204"),
        ({"problem": "q", "answer": "033", "solution": r"so \boxed{33}"}, "33"),
        ({"problem": "q", "answer": 27.0}, "27"),
        ({"problem": "q", "answer": "27.0"}, "27"),
        ({"question": "q", "answer": 7}, "7"),
        ({"Problem": "q", "Answer": "70", "ID": "2025-I-1"}, "70"),
        ({"problem": "q", "solution": r"first \boxed{1}, thus $\boxed{\frac{468}{2}}$."}, r"\frac{468}{2}"),
        ({"problem": "q", "answer": None, "solution": r"\boxed{588}"}, "588"),
        ({"problem": "q", "answer": r"\boxed{16}"}, "16"),
        ({"question": "q", "answer": "4.5e33"}, r"4.5 \times 10^{33}"),
        (olympiad_row("q", ["$\\frac{1}{2}$"]), r"\frac{1}{2}"),
        (olympiad_row("q", ["2", "$1$"], is_multiple_answer=True), "2, 1"),
        (olympiad_row("q", ["2", "4/2"]), "2"),
        (olympiad_row("q", ["$x=1$, $y=2$"], is_multiple_answer=True), "x=1, y=2"),
    ],
)
def test_answers_are_found_where_the_sets_have_them(tmp_path, row, answer):
    source = write_jsonl([row], tmp_path / "s.jsonl")
    assert asked_and_answered(prepared_rows("olympiadbench", source, tmp_path)) == [("q", answer)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (olympiad_row("q", ["1"], image_1={"bytes": "..."}), "needs a picture"),
        (olympiad_row("q", ["1"], modality="Multimodal"), "needs a picture"),
        (olympiad_row("Show that.", None), "no answer that can be boxed"),
        (olympiad_row("q", []), "no answer that can be boxed"),
        (olympiad_row(" ", ["1"]), "no problem"),
        (olympiad_row("q", ["\\frac{1}{2"]), "no answer that can be boxed"),
    ],
)
def test_rows_that_are_no_problem_are_counted_by_reason(tmp_path, row, reason):
    source = write_jsonl([olympiad_row("good", ["1"]), row, row], tmp_path / "s.jsonl")
    prepared = prepare("olympiadbench", tmp_path, source=str(source), allow_any_count=True)
    assert prepared.dropped == {reason: 2} and prepared.written == 1


def test_the_context_of_a_question_is_part_of_it(tmp_path):
    source = write_jsonl([olympiad_row("What is $a$?", ["1"], context="Let $a=1$.")], tmp_path / "s.jsonl")
    assert asked_and_answered(prepared_rows("olympiadbench", source, tmp_path))[0][0] == "Let $a=1$.\n\nWhat is $a$?"


@pytest.mark.parametrize("value", [None, "", "  ", True, math.nan, {"a": 1}, "{", "x" * 2000, ["1", "{"], r"\boxed{1"])
def test_no_ground_truth(value):
    assert ground_truth(value) is None


@pytest.mark.parametrize(
    ("text", "truth"), [(r"\$18.90", r"\$18.90"), ("-0", "-0"), ("+5", "5"), (1e-7, r"1 \times 10^{-7}")]
)
def test_ground_truth(text, truth):
    assert ground_truth(text) == truth


def test_a_solution_without_a_box_has_no_answer():
    assert boxed("The answer is 5.") is None and boxed(["5"]) is None and boxed(r"\boxed{}") is None


@pytest.mark.parametrize("name", SETS)
def test_a_wrong_count_is_refused_and_can_be_allowed(tmp_path, name):
    found = SETS[name]
    source = write_jsonl(plain_rows(found.lowest - 1), tmp_path / "s.jsonl")
    with pytest.raises(ValueError, match=f"{name}: {found.lowest - 1} problems in .*expected {found.expected}"):
        prepare(name, tmp_path / "out", source=str(source))
    assert not (tmp_path / "out").exists()
    assert prepare(name, tmp_path, source=str(source), allow_any_count=True).written == found.lowest - 1


def test_the_counts_of_the_sets():
    counts = {name: found.expected for name, found in SETS.items()}
    assert counts == {
        "dapo-math-17k": "17,000 to 17,917",
        "math-500": "500",
        "aime-2024": "30",
        "aime-2025": "30",
        "amc-2023": "40",
        "minerva-math": "272",
        "olympiadbench": "674",
    }
