"""``verl-pte prepare-data``: what it prints, how it ends, and the commands of docs/data.md."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from math_files import dapo_row, dapo_rows, olympiad_row, plain_rows, write_jsonl, write_parquet
from typer.testing import CliRunner, Result

from verl_pte.cli import app
from verl_pte.data import SETS, read_rows

DOC = Path(__file__).resolve().parents[1] / "docs" / "data.md"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prepare-data", *map(str, arguments)], env={"COLUMNS": "200"})


def table(result: Result) -> list[list[str]]:
    """Cells of the table's lines below its heading."""
    lines = [line for line in result.stdout.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_counts_are_printed(tmp_path):
    rows = [*dapo_rows(problems=30, copies=3), dapo_row("a?", "1"), dapo_row("a?", "2"), dapo_row("b?", "{")]
    source = write_parquet(rows, tmp_path / "s.parquet")
    result = run("dapo-math-17k", "--source", source, "--output", tmp_path / "data", "--allow-any-count")
    assert result.exit_code == 0, result.output
    assert table(result) == [["dapo-math-17k", "93", "61", "2", "30", "17,000 to 17,917"]]
    assert "dapo-math-17k: 1 dropped: copies with different answers" in result.stdout
    assert "dapo-math-17k: 1 dropped: no answer that can be boxed" in result.stdout
    assert f"dapo-math-17k: {tmp_path}/data/dapo-math-17k.parquet" in result.stdout


def test_options_make_the_prompt(tmp_path):
    source = write_jsonl(plain_rows(40), tmp_path / "s.jsonl")
    named = ("amc-2023", "--source", source, "--output", tmp_path)
    for options, messages in (
        (["--family", "r1-distill", "--template", "Q: {problem}"], [("user", "Q: What is $0 + 1$?")]),
        (["--system", "Be brief."], [("system", "Be brief."), ("user", "What is $0 + 1$?")]),
        (["--system", ""], [("user", "What is $0 + 1$?")]),
    ):
        assert run(*named, *options).exit_code == 0
        prompt = read_rows(tmp_path / "amc-2023.parquet")[0]["prompt"]
        assert [(message["role"], message["content"]) for message in prompt] == messages


def test_bad_input_ends_with_a_line(tmp_path):
    source = write_jsonl(plain_rows(83), tmp_path / "s.jsonl")
    given = ("--source", source, "--output", tmp_path / "out")
    for arguments, message in (
        (["amc-2023", "gsm8k", *given], "Error: gsm8k: no such data set; known are dapo-math-17k"),
        (["amc-2023", "math-500", *given], "is one set's; prepare amc-2023 and math-500 one by one"),
        (["amc-2023", "math-500", "--output", "x.parquet"], "--output x.parquet: is one set's"),
        (["amc-2023", *given, "--family", "llama"], "--family llama: must be one of qwen2.5, r1-distill, dapo"),
        (["amc-2023", *given], "83 problems in"),
        (["amc-2023", *given], "expected 40; 83 rows read, 0 duplicates. --allow-any-count writes another variant"),
        (["amc-2023", "--source", "nowhere", "--output", tmp_path / "out"], "--source nowhere: no such file"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.output, result.output
        assert "Traceback" not in result.output and table(result) == []
    assert not (tmp_path / "out").exists()


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[dict]]) -> list[str]:
    """Serve these rows by hub id; the ids that were asked for."""
    asked: list[str] = []

    def load_dataset(hub_id, *, split, streaming):
        asked.append(hub_id)
        assert streaming and split == "test"
        if hub_id not in rows:
            raise ConnectionError("the hub is away")
        return iter(rows[hub_id])

    monkeypatch.setattr("datasets.get_dataset_split_names", lambda hub_id: ["test"])
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_what_was_written_before_an_error_is_told(tmp_path, monkeypatch):
    fake_hub(monkeypatch, {"math-ai/amc23": plain_rows(40)})
    result = run("amc-2023", "math-500", "--output", tmp_path)
    assert (
        result.exit_code == 2
        and "HuggingFaceH4/MATH-500: cannot be read from the hub (the hub is away)" in result.stderr
    )
    assert table(result) == [["amc-2023", "40", "0", "0", "40", "40"]]
    assert [path.name for path in tmp_path.iterdir()] == ["amc-2023.parquet"]


def test_a_missing_package_and_an_interrupt_have_their_status(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        result = run("math-500", "--output", tmp_path / "out")
        assert result.exit_code == 1 and "pip install 'verl-pte[data]'" in result.output
    monkeypatch.setattr("verl_pte.data.preparation.open_source", interrupted)
    result = run("math-500", "--output", tmp_path / "out")
    assert result.exit_code == 130 and "stopped; nothing of math-500 was written" in result.output
    assert not (tmp_path / "out").exists()


# -- docs/data.md
# -------------------------------------------------------------------------------------------------------


def downloads(folder: Path) -> dict[str, list[dict]]:
    """What the page's commands name: files under `folder`, and the rows of the hub's sets."""
    dapo = [dapo_row(f"What is ${n} + 1$?", str(n + 1)) for n in range(17_000)]
    olympiad = [olympiad_row(f"What is ${n} + 1$?", [f"${n + 1}$"]) for n in range(674)]
    write_parquet(dapo, folder / "downloads" / "dapo-math-17k.parquet")
    write_parquet(olympiad, folder / "downloads" / "olympiadbench" / "data" / "test-00000-of-00001.parquet")
    write_jsonl(plain_rows(500), folder / "downloads" / "MATH-500" / "test.jsonl")
    (folder / "template.txt").write_text("Problem: {problem}\n")
    return {
        "BytedTsinghua-SIA/DAPO-Math-17k": dapo,
        "HuggingFaceH4/MATH-500": plain_rows(500),
        "HuggingFaceH4/aime_2024": plain_rows(30),
        "yentinglin/aime_2025": plain_rows(30),
        "AI-MO/aimo-validation-amc": [row | {"answer": float(row["answer"])} for row in plain_rows(83)],
    }


def test_commands_and_python_of_the_page_run(tmp_path, monkeypatch):
    """With small files in place of the downloads, and a hub of the right size."""
    monkeypatch.chdir(tmp_path)
    asked = fake_hub(monkeypatch, downloads(tmp_path))
    commands = re.findall(r"^    verl-pte (prepare-data .+)$", DOC.read_text(), flags=re.M)
    assert len(commands) == 8
    prompts = []
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, (command, result.output)
        prompts.append(read_rows(Path("data/math-500.parquet"))[0]["prompt"][-1]["content"])
    assert asked == [
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "HuggingFaceH4/MATH-500",
        "HuggingFaceH4/aime_2024",
        "yentinglin/aime_2025",
        "AI-MO/aimo-validation-amc",
    ]
    assert prompts[-2:] == ["Solve: What is $0 + 1$? Box the answer: \\boxed{}.", "Problem: What is $0 + 1$?"]
    assert len(read_rows(Path("data83/amc-2023.parquet"))) == 83
    (block,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.S)
    exec(compile(block, "docs/data.md", "exec"), {})


def test_the_page_lists_the_sets():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\S+/\S+) \| ([^|]+) \| ([^|]+) \|", DOC.read_text(), flags=re.M)
    assert rows == [
        (found.name, found.hub_id, found.expected, "left out" if found.repeated else "kept") for found in SETS.values()
    ]
