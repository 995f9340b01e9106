"""Where rows come from and how a run fails: files, folders, the hub, killed runs, bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from math_files import BARE, dapo_rows, plain_rows, write_jsonl, write_parquet

from verl_pte.data import prepare, read_rows


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
