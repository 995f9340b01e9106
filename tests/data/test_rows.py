r"""What a row asks and what verl reads: prompt families, templates, checks of a prepared file, verl's own data set."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from math_files import DAPO_PROMPT, STEP_BY_STEP, dapo_row, dapo_rows, olympiad_row, write_jsonl, write_parquet

from verl_pte.data import FAMILIES, PromptFormat, prepare, prompt_format, read_rows


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
