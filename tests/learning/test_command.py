"""``bench learning``: what it runs, reports and refuses, and what does not end it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from learning_parts import SMALL, small_cell
from typer.testing import CliRunner

from verl_pte.bench import command
from verl_pte.bench.__main__ import app
from verl_pte.bench.learning import plan, plots
from verl_pte.bench.learning.base import BaseSettings, base_path
from verl_pte.bench.learning.cells import run
from verl_pte.bench.learning.tasks import Task


def test_command_reports_what_is_there(folder, monkeypatch) -> None:
    cells = [small_cell(method=m, seed=s) for m in ("pte", "lora_c") for s in (0, 1)]
    cells.append(small_cell(knobs={"window": 8, "block_size": 2}))
    monkeypatch.setattr(plan, "full", lambda seeds: [cell for cell in cells if cell.seed < seeds])
    done = CliRunner().invoke(app, ["learning", "--output", str(folder), "--jobs", "1"])
    assert done.exit_code == 0, done.output
    content = json.loads((folder / "learning.json").read_text())
    assert content["cells"] == {"planned": 5, "done": 5}
    assert [row["method"] for row in content["rows"]] == ["pte", "lora_c", "pte"]
    assert "| lookup | supervised, 2 steps | LoRA_c | 2 |" in (folder / "learning.md").read_text()
    assert (folder / "learning_methods.png").exists() and (folder / "learning_sweeps.png").exists()
    swept = plots._sweeps(content["rows"])
    assert {knob: [plots._value(row, knob) for row in rows] for knob, rows in swept.items()} == {"window": [8, 16, 16]}
    bad = CliRunner().invoke(app, ["learning", "--only", "nothing", "--output", str(folder)])
    assert bad.exit_code == 2 and "--only nothing: no cell has this in its name" in bad.output
    for more in (["--only", "lora_c"], ["--seeds", "1"]):  # run a part: the report is of all that is there
        done = CliRunner().invoke(app, ["learning", "--output", str(folder), "--jobs", "1", *more])
        assert done.exit_code == 0, done.output
        assert json.loads((folder / "learning.json").read_text())["rows"] == content["rows"]


def test_further_tests_that_a_cell_lacks_are_made(folder, monkeypatch) -> None:
    run(small_cell(), folder)
    cells = [small_cell(far=(24,)), small_cell(far=(24,), seed=1)]
    monkeypatch.setattr(plan, "full", lambda seeds: cells)
    done = CliRunner().invoke(app, ["learning", "--output", str(folder), "--jobs", "1"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads((folder / "learning.json").read_text())["rows"]
    assert row["seeds"] == [0, 1] and [at["work"] for at in row["far"]] == [24]


def test_a_cell_that_cannot_be_reported_is_said_before_the_work(folder, monkeypatch) -> None:
    cells = [small_cell(seed=s) for s in (0, 1)]
    monkeypatch.setattr(plan, "full", lambda seeds: cells)
    run(cells[0], folder)
    path = folder / "cells" / f"{cells[0].name}.json"
    path.write_text(path.read_text().replace('"rank": 16', '"rank": 8'))
    done = CliRunner().invoke(app, ["learning", "--only", "seed=1", "--output", str(folder), "--jobs", "1"])
    assert done.exit_code == 2 and "its pte has rank=8, not 16" in done.output
    assert [file.name for file in (folder / "cells").iterdir()] == [path.name]


def test_a_base_that_does_not_learn_is_a_finding_of_its_cells_alone(folder, monkeypatch) -> None:
    hopeless = BaseSettings(hidden_size=32, layers=1, steps=1, batch=2)
    monkeypatch.setattr(plan, "full", lambda seeds: [small_cell(base=hopeless), small_cell(seed=1)])
    done = CliRunner().invoke(app, ["learning", "--output", str(folder), "--jobs", "1"])
    assert done.exit_code == 0, done.output
    failed, _ = (run(cell, folder) for cell in plan.full(2))
    assert failed["failure"].startswith("the base did not learn lookup in 1 steps")
    table = (folder / "learning.md").read_text().split("\n\n")[0]
    assert "| PTE | failed | the base did not learn" in table and "| PTE | 1 | " in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_base_that_cannot_be_made_does_not_end_the_rest(folder, monkeypatch) -> None:
    path = base_path(Task("tracking"), SMALL, folder / "bases")
    path.mkdir()
    (path / "config.json").write_text("cut off in the mid")
    monkeypatch.setattr(plan, "full", lambda seeds: [small_cell(task="tracking"), small_cell()])
    done = CliRunner().invoke(app, ["learning", "--output", str(folder), "--jobs", "1"])
    assert done.exit_code == 0 and "failed, and left for another run: tracking.supervised" in done.output, done.output
    assert json.loads((folder / "learning.json").read_text())["cells"] == {"planned": 2, "done": 1}


def alive(process: str) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_command_leaves_no_process_behind(folder, how) -> None:
    endless = """
from pathlib import Path
from learning_parts import small_cell
from rich.console import Console
from verl_pte.bench.learning.pool import run_all

if __name__ == "__main__":
    cells = [small_cell(steps=10**6, seed=seed) for seed in range(2)]
    run_all(cells, Path("."), 2, Console(force_terminal=True, width=200))
"""
    (folder / "endless.py").write_text(endless)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "endless.py"], cwd=folder, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        shown = ""
        while not all(f"seed={seed}: answer" in shown for seed in range(2)):
            line = process.stdout.readline()
            assert line, f"it ended: {shown}"
            shown += line
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
        process.send_signal(how)
        process.wait()
        deadline = time.monotonic() + 60
        while any(alive(child) for child in children):
            assert time.monotonic() < deadline, "workers are still there"
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_quick_ends_with_what_it_found_as_json(folder, monkeypatch) -> None:
    cells = [small_cell(method=method) for method in ("pte", "lora_c", "global_only")]
    answers = {"pte": 0.75, "lora_c": 0.25, "global_only": 0.5}
    monkeypatch.setattr(plan, "quick", lambda: cells)

    def quick(*options):
        return CliRunner().invoke(app, ["learning", "--quick", "--jobs", "1", "--output", str(folder), *options])

    late = quick("--minutes", "0")
    assert late.exit_code == 1 and "3 of 3 cells are missing" in late.output
    shutil.copytree(folder / "bases", folder / "quick" / "bases")
    assert quick().exit_code == 0
    for cell in cells:  # so small a model answers nothing right
        path = folder / "quick" / "cells" / f"{cell.name}.json"
        found = json.loads(path.read_text())
        found["history"][-1]["answer"] = answers[cell.method]
        path.write_text(json.dumps(found))
    verdict = json.loads((done := quick()).stdout.splitlines()[-1])
    assert done.exit_code == 0 and verdict["answer"] == answers and verdict["task"] == "lookup"
    assert (verdict["pte_minus_lora_c"], verdict["pte_minus_global_only"]) == (0.5, 0.25)
    path.write_text(json.dumps({"cell": found["cell"], "failure": "no gradient", "commit": None}))
    done = quick()
    assert done.exit_code == 1 and json.loads(done.stdout.splitlines()[-1])["failures"] == {
        "global_only": "no gradient"
    }


def test_quick_takes_no_part_of_the_full_report(tmp_path) -> None:
    for option in (["--only", "pte"], ["--seeds", "2"]):
        done = CliRunner().invoke(app, ["learning", "--quick", "--output", str(tmp_path), *option])
        assert done.exit_code == 2 and "it takes neither --seeds nor --only" in done.output


def test_plots_are_left_out_without_matplotlib(folder, monkeypatch) -> None:
    monkeypatch.setattr(plan, "full", lambda seeds: [small_cell()])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["learning", "--output", str(folder), "--jobs", "1"])
    assert done.exit_code == 0 and "matplotlib: pip install 'verl-pte[docs]'" in done.output
    assert not list(folder.glob("*.png"))


def test_command_refuses_more_seeds_than_it_has_intervals_for(tmp_path) -> None:
    done = CliRunner().invoke(app, ["learning", "--seeds", "11", "--output", str(tmp_path)])
    assert done.exit_code == 2 and "--seeds 11, --jobs 2: must be 1 to 10" in done.output
