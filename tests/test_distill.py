"""Self-distillation: KL(teacher || student) and its gradient against the oracle's, and that steps of it lower it."""

import pytest
import torch
from test_gradients import DifferentiableOracle, problem, worst_relative
from tiny import random_tokens, tiny_model, tiny_pte

from verl_pte import PTEConfig, SamplingParams
from verl_pte.core.reference import Oracle
from verl_pte.distill import SelfDistillation
from verl_pte.distill.ranks import Ranks
from verl_pte.distill.run import load_student
from verl_pte.distill.settings import WarmStartSettings
from verl_pte.learner import Replay

TEMPERATURE = 0.8


def teacher_log_probs(model, prompts, responses):
    """Of the base with its full cache, from the oracle on a model of its own without adapter: per sequence [T, V]."""
    plain = tiny_pte("qwen2", window=None, model=tiny_model("qwen2"), freeze_state=True)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return [
        torch.stack(_logits(Oracle(plain), p, r)).div(TEMPERATURE).log_softmax(-1)
        for p, r in zip(prompts, responses, strict=True)
    ]


def _logits(oracle, prompt, response):
    logits = [oracle.start(prompt.tolist())]
    for token in response.tolist()[:-1]:
        logits.append(oracle.feed(token))
    return logits


def hidden_of_base(model, prompts, responses):
    full = next(iter(model.peft_config.values())).schedule().full()
    with model.disable_adapter():
        return Replay(model, prompts, responses, schedule=full, keep_hidden=True).forward().hidden


@pytest.mark.parametrize("chunk_tokens", [512, 3])
def test_divergence_and_its_gradient_are_the_oracles(chunk_tokens) -> None:
    model = tiny_pte("qwen2")
    prompts, responses, weight, _ = problem()
    hidden = hidden_of_base(model, prompts, responses)
    replay = Replay(model, prompts, responses, temperature=TEMPERATURE, teacher=hidden, chunk_tokens=chunk_tokens)
    found = replay.forward()
    replay.backward(None, d_divergence=weight * found.mask)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    teachers = teacher_log_probs(model, prompts, responses)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        oracle = DifferentiableOracle(model, "full")
        student = torch.stack(_logits(oracle, prompt, response)).div(TEMPERATURE).log_softmax(-1)
        divergence = (teachers[b].exp() * (teachers[b] - student)).sum(-1)
        assert (found.divergence[b, : len(response)] - divergence).abs().max() < 1e-5
        assert (found.divergence[b, len(response) :] == 0).all()
        (divergence * weight[b, : len(response)]).sum().backward()
    exact = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert worst_relative(gradients, exact) <= 1e-5


def test_no_divergence_where_the_student_is_the_teacher() -> None:
    model = tiny_pte("qwen2", window=None, freeze_state=True)
    prompts, responses, *_ = problem()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    found = Replay(model, prompts, responses, teacher=hidden_of_base(model, prompts, responses)).forward()
    assert found.divergence.abs().max() < 1e-6


def test_teacher_of_another_batch_is_refused() -> None:
    model = tiny_pte("qwen2")
    prompts, responses, *_ = problem()
    hidden = hidden_of_base(model, prompts, responses)
    with pytest.raises(ValueError, match=r"teacher of shape .*must be \[4, 30, hidden size\]"):
        Replay(model, prompts, responses, teacher=hidden[:, 1:])


def test_steps_lower_the_divergence_on_the_teachers_own_answers() -> None:
    model = tiny_pte("qwen2")
    distillation = SelfDistillation(model, max_num_seqs=4, max_prompt_length=16, max_response_length=30)
    prompts = random_tokens(5, 9, 3, 14)
    outputs = distillation.rollouts(prompts, SamplingParams(max_tokens=30, seed=0))
    responses = [o.token_ids for o in outputs]
    assert all(o.num_evictions == 0 for o in outputs) and max(o.peak_cache_tokens for o in outputs) > 16 + 8
    own = Replay(
        tiny_pte("qwen2", window=None, freeze_state=True, model=tiny_model("qwen2")),
        *[[torch.tensor(s) for s in x] for x in (prompts, responses)],
    )
    with own.model.disable_adapter():  # the answers are the base's, not the adapter's
        assert (own.forward().log_probs[0, :30] - torch.tensor(outputs[0].log_probs)).abs().max() < 1e-5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    divergences = []
    for _ in range(15):
        optimizer.zero_grad()
        divergences.append(distillation.backward(prompts, responses, micro_batch=3).divergence)
        optimizer.step()
    assert divergences[-1] < 0.5 * divergences[0]


def test_micro_batches_do_not_change_the_gradient() -> None:
    model = tiny_pte("qwen2")
    distillation = SelfDistillation(model, max_num_seqs=4, max_prompt_length=16, max_response_length=30)
    prompts, responses = random_tokens(5, 9, 3), random_tokens(30, 11, 25, seed=1)
    seen = []
    for size in (None, 2, 1):
        model.zero_grad()
        result = distillation.backward(prompts, responses, micro_batch=size)
        seen.append((result.divergence, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    for divergence, gradients in seen[1:]:
        assert divergence == pytest.approx(seen[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, seen[0][1][name], atol=1e-6), name


def test_float16_is_refused(tmp_path):
    tiny_model().half().save_pretrained(tmp_path)
    settings = WarmStartSettings(model=str(tmp_path), pte=PTEConfig(window=16, block_size=8, rank=4))
    with pytest.raises(ValueError, match="--dtype auto: the weights of .* are float16.*use bfloat16 or float32"):
        load_student(settings, torch.device("cpu"))


@pytest.mark.parametrize("other", [0, 3, 5])
def test_ranks_know_whether_they_agree(other, monkeypatch):
    ranks = Ranks("cpu")
    monkeypatch.setattr(ranks, "size", 2)
    monkeypatch.setattr(ranks, "sum", lambda value, square: [value + other, square + other**2])
    assert ranks.agree(3) == (other == 3)
