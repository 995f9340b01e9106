"""The learning benchmark: its tasks are what they claim, its training steps have the gradients they should, its cells
and reports lose nothing. Whether PTE learns is what the benchmark itself measures, in minutes (docs/results.md)."""

import dataclasses
import json

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from verl_pte import RolloutEngine, SamplingParams, attach
from verl_pte.bench import command
from verl_pte.bench.__main__ import app
from verl_pte.bench.learning import cells, plan, plots, report, tasks, training
from verl_pte.bench.learning.base import BaseSettings, base_path, untrained
from verl_pte.bench.learning.cells import Cell, run, warm_cell
from verl_pte.bench.learning.evaluate import accuracy, test_examples
from verl_pte.bench.learning.methods import METHODS, pte_settings
from verl_pte.bench.learning.tasks import ANS, EOS, KINDS, Task

SMALL = BaseSettings(hidden_size=32, layers=1)
WORKS = (10, 20)
test_examples.__test__ = False


def examples_of(kind, count=20, seed=0):
    works = [WORKS[0] + i % 11 for i in range(count)]
    return Task(kind).examples(works, torch.Generator().manual_seed(seed))


def small_model(method="pte", seed=0, kind="lookup", **knobs):
    base = untrained(Task(kind), SMALL)
    torch.manual_seed(seed)
    model = attach(base, pte_settings(method, **knobs))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


# -- tasks -----------------------------------------------------------------------------------------------


def solve(kind, prompt):
    """The thought a prompt asks for, read off it anew."""
    task = Task(kind)
    table = tasks._TABLE

    def step(d, s):
        return (s + d) % 10 if kind == "arithmetic" else table[d][s]

    query = [t - tasks._NAME for t in prompt[1:3]]
    work = prompt[3] - tasks._COUNT
    body, state, thought, facts = prompt[4:-1], 0, [], {}
    digits = task.lead + 2 * task.num_facts
    name = None
    for token in body[:digits]:
        if token >= 10:
            name = token - tasks._MARK
            thought.append(tasks._NAME + name)
        else:
            state = step(token, state)
            thought.append(state)
            if name is not None:
                facts[name], name = state, None
    for count in range(work, 0, -1):
        state = step(count % 10, state)
        thought += [tasks._COUNT + count, state]
    thought.append(ANS)
    if kind == "lookup":
        thought += [tasks._NAME + query[0], facts[query[0]]]
    elif kind == "arithmetic":
        for q in query:
            thought += [tasks._NAME + q, facts[q]]
        thought += [tasks._TOTAL, (facts[query[0]] + facts[query[1]]) % 10]
    else:
        for i in range(task.num_facts):
            assert body[digits + 2 * i] == tasks._RESUME + i
            thought += [tasks._NAME + i, step(body[digits + 2 * i + 1], facts[i])]
    return [*thought, EOS]


@pytest.mark.parametrize("kind", KINDS)
def test_thought_is_what_the_prompt_asks_for(kind) -> None:
    task = Task(kind)
    for example in examples_of(kind):
        assert example.thought == solve(kind, example.prompt)
        assert len(example.prompt) == task.prompt_length
        work = example.prompt[3] - tasks._COUNT
        assert len(example.thought) == task.thought_length(work)
        assert example.thought[example.answer_start - 1] == ANS
        assert max(example.prompt + example.thought) < task.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_facts_have_left_the_window_when_they_are_needed(kind) -> None:
    schedule = pte_settings("pte").schedule()
    for example in examples_of(kind):
        prompt = len(example.prompt)
        last_fact = prompt + Task(kind).lead + 2 * Task(kind).num_facts - 1
        needed = prompt + example.answer_start
        assert not any(schedule.is_visible(prompt, needed, p) for p in range(schedule.pinned(prompt), last_fact + 1))
        assert schedule.pinned(prompt) - prompt <= Task(kind).lead  # no fact is pinned


@pytest.mark.parametrize("kind", KINDS)
def test_scores(kind) -> None:
    task = Task(kind)
    example = examples_of(kind)[0]
    right = example.thought
    assert task.score(example, right) == (1.0, 1.0)
    assert task.score(example, right[: example.answer_start - 1]).answer == 0.0  # never answered
    wrong = list(right)
    wrong[-2] = (wrong[-2] + 1) % 10
    assert task.score(example, wrong) == (0.75 if kind == "tracking" else 0.0, 1.0)
    slip = list(right)
    slip[0] = (slip[0] + 1) % 10
    score = task.score(example, slip)
    assert score.answer == 1.0 and score.chain == pytest.approx(1 - 1 / example.answer_start)
    assert task.score(example, []) == (0.0, 0.0)


def test_bad_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="task='chess': must be one of lookup, tracking, arithmetic"):
        Task("chess")
    with pytest.raises(ValueError, match="num_facts=9: must be 2 to 8"):
        Task(num_facts=9)


# -- training steps --------------------------------------------------------------------------------------


def plain_log_probs(model, prompt, response):
    logits = model(input_ids=torch.tensor([prompt + response[:-1]])).logits[0, len(prompt) - 1 :]
    return -cross_entropy(logits, torch.tensor(response), reduction="none")


def test_supervised_gradient_is_that_of_the_cross_entropy() -> None:
    model = small_model("lora_full")
    model = small_model("lora_full", kind="tracking")
    step = training.supervised(model, Task("tracking"), WORKS, batch=3, seed=5)
    measured = step(7)
    ours = gradients(model)
    model.zero_grad()
    loss = 0.0
    for e in training.drawn(Task("tracking"), WORKS, 3, 5, 7):
        nll = -plain_log_probs(model, e.prompt, e.thought)
        loss = loss + (nll[e.answer_start + 1 : -1 : 2].mean() + 0.5 * nll.mean()) / 3
    loss.backward()
    assert measured["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        assert torch.allclose(ours[name], gradient, atol=1e-5), name


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_grpo_gradient_is_that_of_its_loss(kl) -> None:
    task = Task("lookup")
    model = small_model("lora_full")
    settings = training.GRPO(prompts=2, group=4, kl=kl)
    # An untrained model never answers: pay for something it does by chance.
    object.__setattr__(task, "score", lambda e, r: tasks.Score(float(sum(r) % 2), 0.0))
    step = training.grpo(model, task, WORKS, settings, seed=3)
    measured = step(1)
    ours = gradients(model)
    model.zero_grad()
    examples = training.drawn(task, WORKS, 2, 3, 1)
    engine = RolloutEngine(
        model, max_num_seqs=8, max_prompt_length=task.prompt_length, max_response_length=task.thought_length(20) + 8
    )
    sampling = [
        SamplingParams(max_tokens=len(e.thought) + 8, n=4, seed=(3 * 100_003 + 1) * 1009 * 2 + i * 1009)
        for i, e in enumerate(examples)
    ]
    outputs = engine.generate([e.prompt for e in examples], sampling)
    rewards = torch.tensor([float(sum(o.token_ids) % 2) for o in outputs]).view(2, 4)
    assert measured["reward"] == pytest.approx(rewards.mean().item()) and 0 < rewards.mean() < 1
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).flatten()
    total, loss = sum(len(o.token_ids) for o in outputs), 0.0
    for output, advantage in zip(outputs, advantages, strict=True):
        prompt = examples[output.prompt_index].prompt
        log_probs = plain_log_probs(model, prompt, output.token_ids)
        loss = loss - (log_probs * advantage).sum() / total
        with torch.no_grad(), model.disable_adapter():
            base = plain_log_probs(model, prompt, output.token_ids)
        loss = loss + kl * ((base - log_probs).exp() - (base - log_probs) - 1).sum() / total
    loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.allclose(ours[name], gradient, atol=1e-5), name
    assert measured["mismatch"] < 1e-5


def test_distilled_rollouts_serve_several_steps_and_are_the_teachers() -> None:
    model = small_model()
    step = training.distilled(model, Task("lookup"), WORKS, batch=2, seed=0)
    first, again = step(0), step(1)
    fresh = small_model()
    for i in (0, 1):
        fresh.zero_grad()
        expected = training.distilled(fresh, Task("lookup"), WORKS, batch=2, seed=0)(i)
        assert expected["loss"] == pytest.approx((first, again)[i]["loss"], rel=1e-5)
    assert first["loss"] > 0 and first["loss"] != again["loss"]


def test_optimizer_scales_the_encoders_rate_and_stops_at_bad_gradients() -> None:
    settings = training.Optimization(steps=3, lr=1e-3, warmup=1, encoder_lr=0.0)
    model = small_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    list(training.optimize(model, settings, training.supervised(model, Task("lookup"), WORKS, 2, 0)))
    moved = {n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert moved == {n for n in before if "encoder" not in n}

    def broken(index):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, torch.nan)
        return {}

    with pytest.raises(RuntimeError, match="step 0: the gradients are not finite"):
        list(training.optimize(model, settings, broken))


# -- cells and reports -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    untrained(Task("lookup"), SMALL).save_pretrained(base_path(Task("lookup"), SMALL, tmp_path / "bases"))
    return tmp_path


def small_cell(**settings):
    return Cell(**dict(task="lookup", method="pte", way="supervised", steps=2, batch=2, tests=4, base=SMALL) | settings)


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
    for task in KINDS:
        for way in ("supervised", "grpo"):
            seen = {(c.method, c.seed) for c in cells if (c.task, c.way, c.warm) == (task, way, 0) and not c.knobs}
            assert seen >= {(m, s) for m in METHODS if m != "base" for s in range(3)}


def test_grpo_starts_from_the_distilled_adapter(folder, monkeypatch) -> None:
    started, grpo = {}, training.grpo

    def note(model, *args):
        started.update({k: v.clone() for k, v in get_peft_model_state_dict(model).items()})
        return grpo(model, *args)

    monkeypatch.setattr(training, "grpo", note)
    cell = small_cell(way="grpo", warm=3, steps=1, lr=0.0)
    found = run(cell, folder)
    warm = json.loads((folder / "cells" / f"{warm_cell(cell).name}.json").read_text())
    assert found["history"][0] == warm["history"][-1] | {"step": 0}
    kept = load_file(folder / "adapters" / warm_cell(cell).name / "adapter_model.safetensors")
    assert kept.keys() == started.keys() and all(torch.equal(kept[name], started[name]) for name in kept)


def test_failure_is_a_finding(tmp_path) -> None:
    found = run(small_cell(base=BaseSettings(hidden_size=32, layers=1, steps=1, batch=2)), tmp_path)
    assert found["failure"].startswith("the base did not learn lookup in 1 steps")
    (row,) = report.summarize([found])
    assert row["seeds"] == [] and "did not learn" in report.markdown([row])


def test_summary_is_over_seeds(folder) -> None:
    found = [run(small_cell(seed=s, way=w), folder) for s in (0, 1) for w in ("supervised", "grpo")]
    rows = {row["way"]: row for row in report.summarize(found)}
    answers = [c["history"][-1]["answer"] for c in found if c["cell"]["way"] == "grpo"]
    assert rows["grpo"]["seeds"] == [0, 1]
    assert rows["grpo"]["answer"]["mean"] == pytest.approx(sum(answers) / 2)
    assert rows["grpo"]["reward"] is not None and "reward" not in rows["supervised"]


def test_report_says_where_seeds_have_different_bases(folder) -> None:
    found = [run(small_cell(seed=s), folder) for s in (0, 1)]
    same, mixed = found, [found[0], found[1] | {"base_digest": "another"}]
    assert " | PTE | 2 | " in report.markdown(report.summarize(same))
    assert " | PTE | 2, 2 bases | " in report.markdown(report.summarize(mixed))


def test_interval_is_students() -> None:
    assert report.interval([1.0, 2.0, 3.0]) == {"mean": 2.0, "half": pytest.approx(4.30 / 3**0.5)}
    assert report.interval([0.5]) == {"mean": 0.5, "half": None}


def test_accuracy_with_the_full_schedule_keeps_everything() -> None:
    """A window that holds all and a small one, with `full()` in its place, are the same policy."""
    examples = test_examples(Task("lookup"), WORKS, 4)
    wide, narrow = small_model(window=256, num_global_tokens=4), small_model(num_global_tokens=4)
    assert accuracy(wide, Task("lookup"), examples) == accuracy(
        narrow, Task("lookup"), examples, pte_settings("pte").schedule().full()
    )


def test_command_reports_what_is_there(folder, monkeypatch) -> None:
    cells = [small_cell(method=m, seed=s) for m in ("pte", "lora_c") for s in (0, 1)]
    cells.append(small_cell(knobs={"window": 8, "block_size": 2}))
    monkeypatch.setattr(plan, "full", lambda seeds: cells)
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


def test_errors_of_the_machine_are_no_findings(folder, monkeypatch) -> None:
    monkeypatch.setattr(training, "supervised", lambda *args: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        run(small_cell(), folder)
    assert not list(folder.glob("cells/*.json"))


def test_two_processes_may_keep_the_same_adapter(folder) -> None:
    cells._keep_adapter(small_model(), folder / "adapters" / "one")
    cells._keep_adapter(small_model(), folder / "adapters" / "one")
    assert [path.name for path in (folder / "adapters").iterdir()] == ["one"]


def test_plots_are_left_out_without_matplotlib(folder, monkeypatch) -> None:
    monkeypatch.setattr(plan, "full", lambda seeds: [small_cell()])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["learning", "--output", str(folder), "--jobs", "1"])
    assert done.exit_code == 0 and "matplotlib: pip install 'verl-pte[docs]'" in done.output
    assert not list(folder.glob("*.png"))


def test_command_refuses_more_seeds_than_it_has_intervals_for(tmp_path) -> None:
    done = CliRunner().invoke(app, ["learning", "--seeds", "11", "--output", str(tmp_path)])
    assert done.exit_code == 2 and "--seeds 11, --jobs 2: must be 1 to 10" in done.output
