"""The tasks of the learning benchmark are what they claim, and so are their scores."""

import pytest
from learning_parts import examples_of

from verl_pte.bench.learning import tasks
from verl_pte.bench.learning.methods import pte_settings
from verl_pte.bench.learning.tasks import ANS, EOS, KINDS, Task


def solve(task, prompt):
    """The thought a prompt asks for, read off it anew."""
    kind = task.kind
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


@pytest.mark.parametrize("knobs", [{}, {"num_facts": 7, "lead": 2}], ids=["usual", "seven facts"])
@pytest.mark.parametrize("kind", KINDS)
def test_thought_is_what_the_prompt_asks_for(kind, knobs) -> None:
    task = Task(kind, **knobs)
    for example in examples_of(kind, **knobs):
        assert example.thought == solve(task, example.prompt)
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
