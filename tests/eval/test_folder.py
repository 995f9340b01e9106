"""The folder of an evaluation: what a killed run leaves, who may write, whose it is."""

import json
from pathlib import Path

import pytest
from eval_parts import open_folder, record

from verl_pte.distill.folder import RunFolder
from verl_pte.eval.folder import EvaluationFolder
from verl_pte.eval.items import Item


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        folder.add([record(0), record(1, window=None)])
        folder.add([record(2)])
    whole = folder.items.read_bytes()
    for end in range(len(whole.splitlines()[0]) + 1, len(whole)):
        folder.items.write_bytes(whole[:end])
        with open_folder(tmp_path) as again:
            lines = whole[:end].count(b"\n")
            assert again.items.read_bytes().count(b"\n") == len(again.done) == lines
            again.add([r for r in (record(1, window=None), record(2)) if r.item not in again.done])
        assert again.items.read_bytes() == whole
    assert [r.item for r in folder.records()] == [Item("set", 0, 0, 16, 8), Item("set", 1, 0, None, 8), record(2).item]
    assert next(iter(folder.records())).text is None
    assert json.loads(whole.splitlines()[0])["text"] == "\u2028 a\nb"


def test_no_item_is_there_twice(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        folder.add([record(0)])
        with pytest.raises(ValueError, match="is done"):
            folder.add([record(0, score=1.0)])
    folder.items.write_bytes(folder.items.read_bytes() * 2)
    with pytest.raises(ValueError, match="line 2: .* is there twice"), open_folder(tmp_path):
        pass
    folder.items.write_text('{"row": 1}\n')
    with pytest.raises(ValueError, match="line 1: is no item"), open_folder(tmp_path):
        pass


def test_one_process_writes(tmp_path: Path) -> None:
    """The lock is of an open file, so a second one of this process stands for another process."""
    with open_folder(tmp_path):
        claimed = (tmp_path / "settings.json").read_text()
        with pytest.raises(ValueError, match="another process is evaluating into it"), open_folder(tmp_path, n=2):
            pass
        assert (tmp_path / "settings.json").read_text() == claimed, "not the other one's, although nothing was done yet"
    with open_folder(tmp_path):
        pass


def test_whose_folder_it_is(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        folder.check_free()
    with open_folder(tmp_path, n=2):  # nothing was done yet
        pass
    with open_folder(tmp_path) as folder:
        folder.add([record()])
    with open_folder(tmp_path):
        pass
    with pytest.raises(ValueError, match="--n 2: --output .* holds a run with 1"), open_folder(tmp_path, n=2):
        pass
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="holds items and does not say of which"), open_folder(tmp_path):
        pass
    warm = tmp_path / "warm"
    RunFolder(str(warm)).claim({"steps": 7})
    with pytest.raises(ValueError, match="settings.json is of another kind of run"):
        EvaluationFolder(str(warm)).check_free()
    assert RunFolder(str(warm)).settings == {"steps": 7}
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    EvaluationFolder(str(other)).check_free()
    (other / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="holds thesis.txt and no evaluation"):
        EvaluationFolder(str(other)).check_free()
    with pytest.raises(ValueError, match="must be a folder, this is a file"):
        EvaluationFolder(str(other / "thesis.txt")).check_free()
