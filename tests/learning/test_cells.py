"""Cells of the learning benchmark run once and go on from what they should; the plan has those it should."""

import dataclasses
import json

import pytest
import torch
from learning_parts import SMALL, small_cell, small_model
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from verl_pte.bench.learning import cells, plan, tasks, training
from verl_pte.bench.learning.base import base_path, untrained
from verl_pte.bench.learning.cells import Cell, run, warm_cell
from verl_pte.bench.learning.methods import METHODS
from verl_pte.bench.learning.tasks import KINDS, Task


def test_cell_runs_once(folder) -> None:
    cell = small_cell(far=(24,))
    found = run(cell, folder)
    assert [h["step"] for h in found["history"]] == [0, 1, 2] and len(found["curve"]) == 1
    assert found["far"][0]["thought_length"] == Task("lookup").thought_length(24)
    path = folder / "cells" / f"{cell.name}.json"
    path.write_text(path.read_text().replace('"commit"', '"mark": 1, "commit"'))
    assert run(cell, folder)["mark"] == 1


def test_cells_of_other_settings_have_other_names() -> None:
    cells = plan.full(3)
    one = cells[0]
    others = {"task": "tracking", "method": "lora_c", "way": "grpo", "seed": 9, "works": (1, 2), "knobs": {"rank": 4}}
    others |= {"cosine": False, "full_reference": False}
    for name in {f.name for f in dataclasses.fields(Cell)} - {"base", "far"}:
        other = others.get(name, getattr(one, name) if name in others else 7)
        assert dataclasses.replace(one, **{name: other}).name != one.name, name
    assert len({cell.name for cell in cells}) == len(cells)


def test_the_plan_trains_every_method_both_ways_with_every_seed() -> None:
    seen = {(c.task, c.way, c.method, c.seed) for c in plan.full(3) if not c.warm and not c.knobs}
    methods = [method for method in METHODS if method != "base"]
    for seed in range(3):
        for way in ("supervised", "grpo"):
            assert seen >= {(task, way, method, seed) for task in KINDS for method in methods}
    assert {c.method for c in plan.full(3) if c.way == "main_ppo"} == set(methods)
    unhelped = {
        (c.task, c.method, c.seed) for c in plan.full(3) if c.way == "grpo" and c.warm and c.rewarded and not c.kl
    }
    assert unhelped == {(task, method, seed) for task in KINDS[:2] for method in ("pte", "lora_c") for seed in range(3)}


def test_lora_of_the_same_size_is_of_the_same_size() -> None:
    pte, lora = (small_model(method, **knobs) for method, knobs in (("pte", {}), ("lora_c", {"rank": plan.SAME_SIZE})))
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (pte, lora)]
    assert sizes[0] == sizes[1]


def test_a_cell_of_other_settings_is_no_cell_of_these(folder) -> None:
    found = run(cell := small_cell(), folder)
    assert found["pte"]["window"] == 16 and found["pte"]["rank"] == 16
    with pytest.raises(
        ValueError, match=r"supervised\.pte.*its base has layers=1, not 2: remove it, or choose another"
    ):
        run(dataclasses.replace(cell, base=dataclasses.replace(SMALL, layers=2)), folder)
    path = folder / "cells" / f"{cell.name}.json"
    path.write_text(path.read_text().replace('"update_strength": 0.3', '"update_strength": 0.2'))
    with pytest.raises(ValueError, match=r"its pte has update_strength=0.2, not 0.3"):
        run(cell, folder)
    fewer = {name: value for name, value in found["pte"].items() if name != "freeze_state"}  # it was no setting yet
    for mark, kept in enumerate(({"pte": fewer | {"peft_version": "0.1"}}, {"pte": fewer}, {})):
        path.write_text(json.dumps({k: v for k, v in found.items() if k != "pte"} | kept | {"mark": mark}))
        assert run(cell, folder)["mark"] == mark


def test_grpo_starts_from_the_distilled_adapter(folder, monkeypatch) -> None:
    started, grpo = {}, training.grpo

    def note(model, *args):
        started.update({k: v.clone() for k, v in get_peft_model_state_dict(model).items()})
        return grpo(model, *args)

    monkeypatch.setattr(training, "grpo", note)
    # The untrained base gets next to nothing right: a score that tells one adapter from another.
    monkeypatch.setattr(Task, "score", lambda self, e, r: tasks.Score(sum(r) / 1000, 0.0, False))
    cell = small_cell(way="grpo", warm=3, steps=1, lr=0.0)
    found = run(cell, folder)
    warm = json.loads((folder / "cells" / f"{warm_cell(cell).name}.json").read_text())
    assert warm["history"][-1]["answer"] != warm["history"][0]["answer"]
    assert found["history"][0] == warm["history"][-1] | {"step": 0}
    kept = load_file(folder / "adapters" / warm_cell(cell).name / "adapter_model.safetensors")
    assert kept.keys() == started.keys() and all(torch.equal(kept[name], started[name]) for name in kept)


def test_an_adapter_of_another_base_is_not_gone_on_with(folder) -> None:
    run(warm_cell(cell := small_cell(way="grpo", warm=2)), folder)
    other = untrained(Task("lookup"), dataclasses.replace(SMALL, seed=7))
    other.save_pretrained(base_path(Task("lookup"), SMALL, folder / "bases"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="is of another base than .*: remove its cell and adapter"):
            run(cell, folder)
        (folder / "cells" / f"{warm_cell(cell).name}.json").unlink(missing_ok=True)  # the adapter says so too


def test_errors_of_the_machine_are_no_findings(folder, monkeypatch) -> None:
    monkeypatch.setattr(training, "supervised", lambda *args: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        run(small_cell(), folder)
    assert not list(folder.glob("cells/*.json"))


def test_an_adapter_that_is_there_already_is_kept(folder) -> None:
    path = folder / "adapters" / "one"
    for _ in range(2):
        cells._keep_adapter(small_model(), path, "a base")
        assert [path.name for path in (folder / "adapters").iterdir()] == ["one"]
    kept = (path / "adapter_model.safetensors").read_bytes()
    (path / "base_digest").unlink()  # as an older version left it
    for base in ("a base", "another base"):
        cells._keep_adapter(small_model(seed=1), path, base)
        assert cells._base_of(path) == base and (path / "adapter_model.safetensors").read_bytes() != kept
