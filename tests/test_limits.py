"""Known limits recovered: the base under an explicit mask, PEFT's LoRA, transformers' own full attention."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, random_tokens, tiny_model, tiny_pte

from verl_pte import PTEConfig, attach, replay_log_probs
from verl_pte.core.schedule import Schedule

TOLERANCE = 1e-5


def masked_log_probs(model, schedule, prompt, response):
    """transformers with the schedule's whole 4D mask, one forward of prompt and response."""
    tokens = prompt + response
    n = len(tokens)
    visible = torch.tensor([[schedule.is_visible(len(prompt), q, k) for k in range(n)] for q in range(n)])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), attention_mask=visible[None, None]).logits[0]
    log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return log_probs.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("window", [8, 32, None])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_zero_lora_B_is_transformers_under_the_explicit_mask(arch, window):
    base = tiny_model(arch)
    prompts, responses = random_tokens(3, 12, 21), random_tokens(60, 41, 50, seed=1)
    schedule = Schedule(window, 0.25, 4)
    expected = [masked_log_probs(base, schedule, p, r) for p, r in zip(prompts, responses, strict=True)]
    model = attach(base, PTEConfig(rank=4, window=window, block_size=4, num_global_tokens=2))
    replayed = replay_log_probs(model, prompts, responses)
    assert max((a - b).abs().max() for a, b in zip(expected, replayed, strict=True)) <= TOLERANCE
    if window == 8:  # the mask matters here
        full = masked_log_probs(base, Schedule(None, 0.25, 4), prompts[0], responses[0])
        assert (full - expected[0]).abs().max() > 1e-2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_identity_state_without_window_is_peft_lora(arch):
    pte = tiny_pte(arch, None, freeze_state=True)
    lora = get_peft_model(
        tiny_model(arch), LoraConfig(r=6, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    ours = dict(pte.named_parameters())
    copied = 0
    for name, parameter in lora.named_parameters():
        for which in ("lora_A", "lora_B"):
            if which in name:
                parameter.data.copy_(ours[name.replace(f"{which}.default", f"pte_adapter.default.{which}")])
                copied += 1
    assert copied == sum(p.requires_grad for p in pte.parameters()) == 2 * 2 * 7
    prompts, responses = random_tokens(3, 12), random_tokens(40, 30, seed=1)
    replayed = replay_log_probs(pte, prompts, responses)
    for prompt, response, ours_log_probs in zip(prompts, responses, replayed, strict=True):
        expected = masked_log_probs(lora, Schedule(None), prompt, response)
        assert (expected - ours_log_probs).abs().max() <= TOLERANCE
        with lora.disable_adapter():
            assert (masked_log_probs(lora, Schedule(None), prompt, response) - ours_log_probs).abs().max() > 1e-2


def test_plain_forward_is_the_full_cache_result():
    model = tiny_pte("qwen2", 8)
    unbounded = tiny_pte("qwen2", None)
    (prompt,), (response,) = random_tokens(9), random_tokens(40, seed=1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]
    assert (expected - replay_log_probs(unbounded, [prompt], [response])[0]).abs().max() <= TOLERANCE
