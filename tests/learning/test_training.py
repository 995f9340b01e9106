"""Training steps of the learning benchmark have the gradients they should.

Whether PTE learns is what the benchmark itself measures (docs/results.md).
"""

import pytest
import torch
from learning_parts import WORKS, small_model
from torch.nn.functional import cross_entropy, kl_div

from verl_pte import RolloutEngine, SamplingParams, replay_log_probs
from verl_pte.bench.learning import tasks, training
from verl_pte.bench.learning.evaluate import accuracy, test_examples
from verl_pte.bench.learning.methods import pte_settings
from verl_pte.bench.learning.tasks import Task

test_examples.__test__ = False


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


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


@pytest.mark.parametrize("full_reference", [True, False])
def test_grpo_holds_a_bounded_policy_to_the_reference_it_asks_for(full_reference) -> None:
    task, model = Task("lookup"), small_model("lora_c")
    settings = training.GRPO(prompts=2, group=2, kl=1.0, full_reference=full_reference, rewarded=False)
    engine = RolloutEngine(
        model, max_num_seqs=4, max_prompt_length=task.prompt_length, max_response_length=task.thought_length(20) + 8
    )
    examples = training.drawn(task, WORKS, 2, 3, 0)
    sampling = [
        SamplingParams(max_tokens=len(e.thought) + 8, n=2, seed=3 * 100_003 * 1009 * 2 + i * 1009)
        for i, e in enumerate(examples)
    ]
    expected = {True: 0.0, False: 0.0}
    outputs = engine.generate([e.prompt for e in examples], sampling)
    for output in outputs:
        prompt, response = examples[output.prompt_index].prompt, output.token_ids
        pairs = [torch.tensor(prompt)], [torch.tensor(response)]
        (policy,) = replay_log_probs(model, *pairs)
        with torch.no_grad(), model.disable_adapter():
            (bounded,) = replay_log_probs(model, *pairs)
            for full, base in ((True, plain_log_probs(model, prompt, response)), (False, bounded)):
                ratio = base - policy
                expected[full] += float((ratio.exp() - ratio - 1).sum()) / sum(len(o.token_ids) for o in outputs)
    measured = training.grpo(model, task, WORKS, settings, seed=3)(0)
    assert measured["kl"] == pytest.approx(expected[full_reference], rel=1e-4)
    assert measured["kl"] != pytest.approx(expected[not full_reference], rel=1e-2)


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


def test_accuracy_with_the_full_schedule_keeps_everything() -> None:
    """A window that holds all and a small one, with `full()` in its place, are the same policy."""
    task = Task("lookup")
    examples = test_examples(task, WORKS, 4)
    # An untrained model answers nothing right: tell responses apart by their tokens.
    object.__setattr__(task, "score", lambda e, r: tasks.Score(float(sum(r)), sum(r[::2]), False))
    wide, narrow = small_model(window=256, num_global_tokens=4), small_model(num_global_tokens=4)
    whole = accuracy(wide, task, examples)
    assert whole == accuracy(narrow, task, examples, pte_settings("pte").schedule().full())
    assert whole != accuracy(narrow, task, examples)


def test_learning_rate_warms_up_and_falls_along_half_a_cosine() -> None:
    falling = training.Optimization(steps=100, lr=2.0, warmup=10)
    assert falling.rate(0) == pytest.approx(0.2) and falling.rate(50) == pytest.approx(2.0 * 0.55)
    assert falling.rate(99) == pytest.approx(0.2, rel=0.01)
    constant = training.Optimization(steps=100, lr=2.0, warmup=10, cosine=False)
    assert constant.rate(4) == pytest.approx(1.0) and constant.rate(99) == 2.0
