"""The learning benchmark: its tasks are what they claim, its training steps have the gradients they should, its cells
and reports lose nothing. Whether PTE learns is what the benchmark itself measures, in minutes (docs/results.md)."""

import dataclasses
import json

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div
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
    assert task.score(example, right) == (1.0, 1.0, False)
    assert task.score(example, right[: example.answer_start - 1]).answer == 0.0  # never answered
    wrong = list(right)
    wrong[-2] = (wrong[-2] + 1) % 10
    assert task.score(example, wrong) == (0.75 if kind == "tracking" else 0.0, 1.0, False)
    slip = list(right)
    slip[0] = (slip[0] + 1) % 10
    score = task.score(example, slip)
    assert score.answer == 1.0 and score.chain == pytest.approx(1 - 1 / example.answer_start)
    assert task.score(example, []) == (0.0, 0.0, False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_leaves_out_work_is_worth_nothing(kind) -> None:
    task = Task(kind)
    example = examples_of(kind)[0]
    facts, answer = task.lead + 2 * task.num_facts, example.thought[example.answer_start - 1 :]
    whole = example.answer_start - 1
    for left_out, early in ((0, False), (2, False), (6, True), (whole - facts, True)):  # two tokens are a step of work
        score = task.score(example, example.thought[: whole - left_out] + answer)
        assert (score.early, score.answer) == (early, 1.0 - early), left_out
    other_work = [0] * (whole - facts)  # what is thought meanwhile is the model's
    score = task.score(example, example.thought[:facts] + other_work + answer)
    assert (score.answer, score.early) == (1.0, False) and score.chain < 1
    assert task.score(example, [*example.thought[:whole], 0, *answer]).answer == 1.0  # later


def test_bad_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="task='chess': must be one of lookup, tracking, arithmetic"):
        Task("chess")
    with pytest.raises(ValueError, match="num_facts=9: must be 2 to 8"):
        Task(num_facts=9)


# -- training steps --------------------------------------------------------------------------------------


def logits_of(model, prompt, response):
    logits = model(input_ids=torch.tensor([prompt + response[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1)


def plain_log_probs(model, prompt, response):
    return -cross_entropy(logits_of(model, prompt, response), torch.tensor(response), reduction="none")


def test_supervised_gradient_is_that_of_the_cross_entropy() -> None:
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


@pytest.mark.parametrize(("kl", "rewarded"), [(0.0, True), (0.5, True), (0.5, False)])
def test_grpo_gradient_is_that_of_its_loss(kl, rewarded) -> None:
    task = Task("lookup")
    model = small_model("lora_full")
    settings = training.GRPO(prompts=2, group=4, kl=kl, rewarded=rewarded)
    # An untrained model never answers: pay for something it does by chance.
    object.__setattr__(task, "score", lambda e, r: tasks.Score(float(sum(r) % 2), 0.0, False))
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
        loss = loss - rewarded * (log_probs * advantage).sum() / total
        with torch.no_grad(), model.disable_adapter():
            base = plain_log_probs(model, prompt, output.token_ids)
        loss = loss + kl * ((base - log_probs).exp() - (base - log_probs) - 1).sum() / total
    loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.allclose(ours[name], gradient, atol=1e-5), name
    assert measured["mismatch"] < 1e-5


def test_distilled_rollouts_serve_several_steps_and_are_the_teachers() -> None:
    model = small_model("lora_full")
    step = training.distilled(model, Task("lookup"), WORKS, batch=2, seed=0)
    for i in (0, 1):
        examples, total, tokens = training.drawn(Task("lookup"), WORKS, 2, 0, i), 0.0, 0
        for example in examples:
            with torch.no_grad():
                with model.disable_adapter():
                    response = model.generate(
                        torch.tensor([example.prompt]), do_sample=False, max_new_tokens=len(example.thought) + 8
                    )[0, len(example.prompt) :].tolist()
                    teacher = logits_of(model, example.prompt, response)
                student = logits_of(model, example.prompt, response)
            total += kl_div(student, teacher, log_target=True, reduction="sum").item()
            tokens += len(response)
        assert step(i)["loss"] == pytest.approx(total / tokens, rel=1e-4) and total > 0


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
    assert len({cell.name for cell in cells}) == len(cells)


def test_the_plan_trains_every_method_both_ways_with_every_seed() -> None:
    seen = {(c.task, c.way, c.method, c.seed) for c in plan.full(3) if not c.warm and not c.knobs}
    methods = [method for method in METHODS if method != "base"]
    for seed in range(3):
        assert seen >= {(task, "supervised", method, seed) for task in KINDS for method in methods}
        assert seen >= {("lookup", "grpo", method, seed) for method in methods}
        assert seen >= {(task, "grpo", method, seed) for task in KINDS for method in ("pte", "lora_c")}
    assert {c.method for c in plan.full(3) if c.way == "main_ppo"} == set(methods)


def test_lora_of_the_same_size_is_of_the_same_size() -> None:
    pte, lora = (small_model(method, **knobs) for method, knobs in (("pte", {}), ("lora_c", {"rank": plan.SAME_SIZE})))
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (pte, lora)]
    assert sizes[0] == sizes[1]


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


def test_a_base_that_does_not_learn_is_a_finding_of_its_cells_alone(folder, monkeypatch) -> None:
    hopeless = BaseSettings(hidden_size=32, layers=1, steps=1, batch=2)
    monkeypatch.setattr(plan, "full", lambda seeds: [small_cell(base=hopeless), small_cell(seed=1)])
    done = CliRunner().invoke(app, ["learning", "--output", str(folder), "--jobs", "1"])
    assert done.exit_code == 0, done.output
    failed, _ = (run(cell, folder) for cell in plan.full(2))
    assert failed["failure"].startswith("the base did not learn lookup in 1 steps")
    table = (folder / "learning.md").read_text()
    assert "| PTE | failed | the base did not learn" in table and "| PTE | 1 | " in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def found_as(seed, reward, way="grpo"):
    """What a cell might have found: answers that end at a tenth of its seed; a reward for each block of steps."""
    cell = dataclasses.asdict(small_cell(seed=seed, way=way))
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


def test_a_base_that_cannot_be_made_does_not_end_the_rest(folder, monkeypatch) -> None:
    path = base_path(Task("tracking"), SMALL, folder / "bases")
    path.mkdir()
    (path / "config.json").write_text("cut off in the mid")
    monkeypatch.setattr(plan, "full", lambda seeds: [small_cell(task="tracking"), small_cell()])
    done = CliRunner().invoke(app, ["learning", "--output", str(folder), "--jobs", "1"])
    assert done.exit_code == 0 and "failed, and left for another run: tracking.supervised" in done.output, done.output
    assert json.loads((folder / "learning.json").read_text())["cells"] == {"planned": 2, "done": 1}


def test_quick_takes_no_part_of_the_full_report(tmp_path) -> None:
    for option in (["--only", "pte"], ["--seeds", "2"]):
        done = CliRunner().invoke(app, ["learning", "--quick", "--output", str(tmp_path), *option])
        assert done.exit_code == 2 and "it takes neither --seeds nor --only" in done.output


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


def test_two_processes_may_keep_the_same_adapter(folder) -> None:
    path = folder / "adapters" / "one"
    for _ in range(2):
        cells._keep_adapter(small_model(), path, "a base")
        assert [path.name for path in (folder / "adapters").iterdir()] == ["one"]
    kept = (path / "adapter_model.safetensors").read_bytes()
    cells._keep_adapter(small_model(seed=1), path, "another base")
    assert cells._base_of(path) == "another base" and (path / "adapter_model.safetensors").read_bytes() != kept


def test_plots_are_left_out_without_matplotlib(folder, monkeypatch) -> None:
    monkeypatch.setattr(plan, "full", lambda seeds: [small_cell()])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["learning", "--output", str(folder), "--jobs", "1"])
    assert done.exit_code == 0 and "matplotlib: pip install 'verl-pte[docs]'" in done.output
    assert not list(folder.glob("*.png"))


def test_command_refuses_more_seeds_than_it_has_intervals_for(tmp_path) -> None:
    done = CliRunner().invoke(app, ["learning", "--seeds", "11", "--output", str(tmp_path)])
    assert done.exit_code == 2 and "--seeds 11, --jobs 2: must be 1 to 10" in done.output
