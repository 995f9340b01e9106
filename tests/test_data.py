r"""Math data sets: rows of every known format, copies, answers, counts, and the files verl reads."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from math_files import (
    DAPO_PROMPT,
    dapo_row,
    dapo_rows,
    olympiad_row,
    plain_rows,
    write_jsonl,
    write_parquet,
)

from verl_pte.data import FAMILIES, SETS, PromptFormat, prepare, prompt_format, read_rows
from verl_pte.data.truth import boxed, ground_truth

STEP_BY_STEP = r"Please reason step by step, and put your final answer within \boxed{}."
BARE = PromptFormat("{problem}")


def prepared_rows(name: str, source: Path, folder: Path, prompt: PromptFormat = BARE) -> list[dict]:
    return read_rows(prepare(name, folder, source=str(source), prompt=prompt, allow_any_count=True).path)


def asked_and_answered(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["prompt"][-1]["content"], row["reward_model"]["ground_truth"]) for row in rows]


# -- what a set becomes
# -------------------------------------------------------------------------------------------------


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


# -- sources
# ------------------------------------------------------------------------------------------------------------


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
    rows = plain_rows(30, id=5)
    sources = [
        write_parquet(rows, tmp_path / "a" / "test-00000-of-00001.parquet"),
        write_jsonl(rows, tmp_path / "b" / "test.jsonl"),
        write_jsonl(rows, tmp_path / "c" / "lines.json"),
        tmp_path / "d" / "list.json",
    ]
    sources[3].parent.mkdir()
    sources[3].write_text(json.dumps(rows))
    found = []
    for source in (*sources, *(source.parent for source in sources)):
        prepare("aime-2025", tmp_path / "out", source=str(source))
        found.append((tmp_path / "out" / "aime-2025.parquet").read_bytes())
    assert len(found) == 8 and len(set(found)) == 1


def test_a_clone_of_a_hub_repository_is_a_source(tmp_path):
    rows = plain_rows(30)
    write_parquet(rows[:20], tmp_path / "hub" / "data" / "train-00000-of-00002.parquet")
    write_parquet(rows[20:], tmp_path / "hub" / "data" / "train-00001-of-00002.parquet")
    (tmp_path / "hub" / "README.md").write_text("A set.")
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    write_parquet(rows, tmp_path / "hub" / ".cache" / "old.parquet")
    prepared = prepare("aime-2024", tmp_path, source=str(tmp_path / "hub"), prompt=BARE)
    assert prepared.read == 30
    assert [row["prompt"][0]["content"] for row in read_rows(prepared.path)] == [row["problem"] for row in rows]


def hub_of(splits: dict[str, Path], asked: list):
    """Stand-ins for two functions of datasets, the second of which streams local files as the hub's."""
    import datasets

    load = datasets.load_dataset

    def split_names(hub_id):
        asked.append(hub_id)
        return list(splits)

    def load_dataset(hub_id, *, split, streaming):
        asked.append((hub_id, split, streaming))
        return load("parquet", data_files=str(splits[split]), split="train", streaming=streaming)

    return split_names, load_dataset


@pytest.mark.parametrize("splits", [["train"], ["train", "test"]])
def test_the_hub_is_streamed(tmp_path, monkeypatch, splits):
    right = write_parquet(plain_rows(30), tmp_path / "right.parquet")
    asked: list = []
    names, load = hub_of({split: right for split in splits}, asked)
    monkeypatch.setattr("datasets.get_dataset_split_names", names)
    monkeypatch.setattr("datasets.load_dataset", load)
    prepared = prepare("aime-2025", tmp_path)
    assert asked == ["math-ai/aime25", ("math-ai/aime25", splits[-1], True)]
    assert prepared.written == 30 and prepared.source == "math-ai/aime25"


def test_a_hub_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def broken(hub_id, *, split, streaming):
        yield from plain_rows(12)
        raise OSError("connection reset")

    (tmp_path / "aime-2025.parquet").write_text("old")
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda hub_id: ["test"])
    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(RuntimeError, match=r"ended after 12 rows \(OSError: connection reset\)"):
        prepare("aime-2025", tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("aime-2025.parquet", "old")]


def test_without_datasets_files_are_read_and_the_hub_is_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    source = write_parquet(plain_rows(30), tmp_path / "s.parquet")
    assert prepare("aime-2025", tmp_path, source=str(source)).written == 30
    with pytest.raises(RuntimeError, match=re.escape("pip install 'verl-pte[data]'")):
        prepare("aime-2025", tmp_path)


# -- counts and errors
# --------------------------------------------------------------------------------------------------


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


def refusals(folder: Path) -> list[tuple[dict, str]]:
    """(arguments of prepare, part of the message)."""
    two = folder / "two"
    write_jsonl(plain_rows(1), two / "a.jsonl")
    write_parquet(plain_rows(1), two / "b.parquet")
    (folder / "empty").mkdir()
    (folder / "rows.csv").write_text("problem,answer\n")
    (folder / "broken.parquet").write_text("PAR1")
    (folder / "broken.jsonl").write_text('{"problem": "q", "answer": "1"}\n{"problem":\n')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "numbers.json").write_text("[1]")
    no_answer = write_jsonl([{"problem": "q", "level": 3}], folder / "no_answer.jsonl")
    no_problem = write_jsonl([{"text": "q", "answer": "1"}], folder / "no_problem.jsonl")
    no_truth = write_jsonl([{"prompt": [], "reward_model": {"style": "rule"}}], folder / "no_truth.jsonl")
    nothing = write_jsonl([], folder / "nothing.jsonl")
    aime = {"name": "aime-2024"}
    return [
        ({"name": "gsm8k"}, "gsm8k: no such data set; known are dapo-math-17k, math-500"),
        (aime | {"source": "no/such.parquet"}, "--source no/such.parquet: no such file or folder, and no hub id"),
        (aime | {"source": "nowhere"}, "--source nowhere: no such file or folder"),
        (aime | {"source": two}, "must hold files of one kind, .parquet, .jsonl, .json; it holds a.jsonl, b.parquet"),
        (aime | {"source": folder / "empty"}, "it holds nothing"),
        (aime | {"source": folder / "rows.csv"}, "must be a file ending in .parquet, .jsonl, .json"),
        (aime | {"source": folder / "broken.parquet"}, "broken.parquet: not a parquet file"),
        (aime | {"source": folder / "broken.jsonl"}, "broken.jsonl, line 2: not JSON"),
        (aime | {"source": folder / "list.jsonl"}, "list.jsonl, line 1: must be an object, it is [1]"),
        (aime | {"source": folder / "numbers.json"}, "element 0 must be an object, it is 1"),
        (aime | {"source": no_answer}, "no column with the answer; it has problem, level, and known are answer, fin"),
        (aime | {"source": no_problem}, "no column with the problem; it has text, answer, and known are problem, que"),
        (aime | {"source": no_truth}, "no column with the answer; it has prompt, reward_model"),
        (aime | {"source": nothing}, "aime-2024: no problem in"),
        (aime | {"output": folder / "rows.csv"}, "rows.csv: must be a folder, or a file ending in .parquet"),
    ]


def test_bad_input_is_named(tmp_path):
    for arguments, message in refusals(tmp_path):
        given = {"output": tmp_path / "out", "source": str(tmp_path / "nothing.jsonl")} | arguments
        given["source"] = str(given["source"])
        with pytest.raises(ValueError, match=re.escape(message)):
            prepare(**given, allow_any_count=True)
    assert not (tmp_path / "out").exists()


def test_the_hub_offline_is_an_error_that_names_the_set(tmp_path):
    with pytest.raises(ValueError, match="--source nobody/nothing: cannot be read from the hub"):
        prepare("aime-2024", tmp_path, source="nobody/nothing")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(table, path):
        path.write_text("half")
        raise OSError("no space left on device")

    source = write_parquet(plain_rows(30), tmp_path / "s.parquet")
    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    with pytest.raises(OSError, match="no space left"):
        prepare("aime-2024", tmp_path / "out", source=str(source))
    assert list((tmp_path / "out").iterdir()) == []


def test_memory_is_that_of_the_problems_that_stay(tmp_path):
    """More copies of the same problems do not raise the peak: rows are not collected."""
    import tracemalloc

    peaks = []
    for copies in (10, 60):
        source = write_parquet(dapo_rows(problems=200, copies=copies), tmp_path / "s.parquet")
        tracemalloc.start()
        prepared = prepare("dapo-math-17k", tmp_path, source=str(source), allow_any_count=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert prepared.read == 200 * copies and prepared.written == 200
    assert peaks[1] < 1.2 * peaks[0], peaks


STOPS_BEFORE_THE_RENAME = """
import os, sys, time
from pathlib import Path
from verl_pte.data import prepare
def hang(*paths):
    print("written", flush=True)
    time.sleep(600)
os.replace = hang
prepare("aime-2024", Path(sys.argv[1]), source=sys.argv[2])
"""


def test_a_killed_run_leaves_no_parquet_and_the_next_one_finishes(tmp_path):
    source, out = write_jsonl(plain_rows(30), tmp_path / "s.jsonl"), tmp_path / "out"
    argv = [sys.executable, "-c", STOPS_BEFORE_THE_RENAME, str(out), str(source)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.kill()
    process.communicate()
    assert [path.suffix for path in out.iterdir()] == [".unfinished"]
    assert prepare("aime-2024", out, source=str(source)).written == 30
    assert [path.name for path in out.iterdir()] == ["aime-2024.parquet"]


# -- prompts
# ------------------------------------------------------------------------------------------------------------


def test_families():
    assert {name: found.messages("P?") for name, found in FAMILIES.items()} == {
        "qwen2.5": [{"role": "system", "content": STEP_BY_STEP}, {"role": "user", "content": "P?"}],
        "r1-distill": [{"role": "user", "content": f"P?\n\n{STEP_BY_STEP}"}],
        "dapo": [{"role": "user", "content": DAPO_PROMPT.format("P?")}],
    }


def test_template_and_system_replace_the_familys(tmp_path):
    (tmp_path / "template.txt").write_text("Q: {problem}\nThink, then \\boxed{}.\n")
    from_file = prompt_format("r1-distill", template=str(tmp_path / "template.txt"), system="Be brief.")
    assert from_file.messages("{problem} {x}") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: {problem} {x}\nThink, then \\boxed{}."},
    ]
    assert prompt_format("qwen2.5", template="{problem}!", system="").messages("P") == [
        {"role": "user", "content": "P!"}
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "llama"}, "--family llama: must be one of qwen2.5, r1-distill, dapo"),
        (
            {"template": "no placeholder"},
            "--template no placeholder: must be a text with {problem}, or a readable file",
        ),
        ({"template": __file__ + "/x"}, "must be a text with {problem}"),
        ({"template": "FILE"}, "the file must contain {problem}"),
        ({"system": "  "}, "--system '  ': must be a text"),
    ],
)
def test_wrong_prompts_are_named(tmp_path, arguments, message):
    (tmp_path / "file").write_text("nothing")
    given = {key: str(tmp_path / "file") if value == "FILE" else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        prompt_format(**given)
    with pytest.raises(ValueError, match=re.escape("must contain {problem}")):
        PromptFormat("nothing")


# -- reading
# ------------------------------------------------------------------------------------------------------------


def test_read_rows_names_what_is_wrong(tmp_path):
    good = dapo_row("a?", "1")
    assert read_rows(write_parquet([good | {"more": 1}], tmp_path / "good.parquet")) == [good]
    (tmp_path / "text.parquet").write_text("text")
    pq.write_table(pa.table({name: [] for name in good}), tmp_path / "empty.parquet")
    cases = [
        (
            [{"prompt": "text", "level": 3}],
            "no column data_source, ability, reward_model, extra_info; verl's rows need",
        ),
        ([good, good | {"prompt": []}], "row 1: prompt must be a list of {role, content} texts, it is []"),
        ([good | {"prompt": "text"}], "row 0: prompt must be a list of {role, content} texts, it is text"),
        ([good | {"prompt": [{"role": "user"}]}], "row 0: prompt must be a list of {role, content} texts"),
        ([good | {"reward_model": {"ground_truth": " "}}], "row 0: reward_model must have a ground_truth"),
        ([good | {"reward_model": {"style": "rule"}}], "row 0: reward_model must have a ground_truth"),
        ([good | {"data_source": None}], "row 0: data_source must name the data set, it is None"),
    ]
    for number, (rows, message) in enumerate(cases):
        path = write_parquet(rows, tmp_path / f"{number}.parquet")
        with pytest.raises(ValueError, match=re.escape(f"{path}") + ".*" + re.escape(message)):
            read_rows(path)
    for name, message in (("nowhere", "no such file"), ("text", "not a parquet file"), ("empty", "has no rows")):
        with pytest.raises(ValueError, match=f"{name}.parquet: {message}"):
            read_rows(tmp_path / f"{name}.parquet")


def test_verl_reads_the_files_and_the_reward_grades_them(tmp_path):
    """Two sets beside each other in verl's own data set class, and a right and a wrong answer to each row."""
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl_run import make_model

    from verl_pte.rewards.math import compute_score

    olympiad = [
        olympiad_row("Find all $x$.", ["$1$", "$\\frac{1}{2}$"], is_multiple_answer=True),
        olympiad_row("Where?", ["$[0,1)$"]),
    ]
    paths = [
        prepare(
            "olympiadbench", tmp_path, source=str(write_jsonl(olympiad, tmp_path / "o.jsonl")), allow_any_count=True
        ),
        prepare(
            "dapo-math-17k",
            tmp_path,
            source=str(write_jsonl(dapo_rows(2, 3), tmp_path / "d.jsonl")),
            allow_any_count=True,
        ),
    ]
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path / "model"))
    config = OmegaConf.create(
        {"cache_dir": str(tmp_path / "cache"), "max_prompt_length": 512, "filter_overlong_prompts_workers": 1}
    )
    data = RLHFDataset([str(prepared.path) for prepared in paths], tokenizer, config)
    rows = [data[i] for i in range(len(data))]
    assert [row["data_source"] for row in rows] == ["olympiadbench"] * 2 + ["dapo-math-17k"] * 2
    assert [row["index"] for row in rows] == [0, 1, 0, 1]
    text = tokenizer.apply_chat_template(rows[0]["raw_prompt"], add_generation_prompt=True, tokenize=False)
    assert text.startswith(f"<|im_start|>system\n{STEP_BY_STEP}<|im_end|>\n<|im_start|>user\nFind all $x$.<|im_end|>")

    right = [r"So \boxed{\frac12, 1}.", r"\boxed{[0, 1)}", "Answer: 1", r"\boxed{\frac{4}{2}}"]
    wrong = [r"So \boxed{\frac12, 2}.", r"\boxed{[0, 1]}", "Answer: 2", r"\boxed{\frac{5}{2}}"]
    for row, good, bad in zip(rows, right, wrong, strict=True):
        graded = [
            compute_score(row["data_source"], said, row["reward_model"]["ground_truth"], row["extra_info"])["score"]
            for said in (good, bad)
        ]
        assert graded == [1.0, 0.0], (row["reward_model"], graded)
