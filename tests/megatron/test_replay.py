"""The replay on megatron-core against the Hugging Face learner and the oracle, however the model is spread."""

import ast
import functools

import pytest
import torch
from megatron_ranks import (
    Layout,
    batch,
    hf_model,
    replays,
    run_on_ranks,
    score_gradients,
)
from replay_work import new_adapter, reference, replay_half, saved_bytes, two_replays, without_base

from verl_pte.core.reference import Oracle
from verl_pte.learner import Replay

LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(pipeline=2),
    Layout(tensor=2, pipeline=2),
    Layout(tensor=2, pipeline=2, sequence_parallel=True),
    Layout(tensor=4),  # a kv head a rank, and a vocabulary that needs padding
]
# Knobs and shapes that each take another path, on the layout that has everything.
VARIANTS = [
    {"arch": "qwen3"},
    {"arch": "mistral", "chunk_tokens": 3},
    {"pte": {"gradient": "state"}},
    {"pte": {"gradient": "truncated"}},
    {"pte": {"freeze_state": True}},
    {"pte": {"num_global_tokens": 0, "attention": "softmax", "normalize": "frobenius"}},
    {"pte": {"window": None}},
    {"pte": {"update_state": False, "kv_store": "host"}},
    {"pte": {"target_modules": ["k_proj", "down_proj"], "update_strength": None}},
    {"prompts": (41,), "responses": (1,)},
]


@functools.cache
def _expected(key: str) -> dict:
    layout = Layout(**ast.literal_eval(key))
    model = hf_model(layout)
    run = Replay(model, *batch(layout), temperature=0.7, entropy=True, chunk_tokens=layout.chunk_tokens)
    found = run.forward()
    run.backward(*score_gradients(layout))
    return {
        "log_probs": found.log_probs,
        "entropy": found.entropy,
        "state_norm": found.state_norm,
        "update_ratio": found.update_ratio,
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
    }


def expected(**settings) -> dict:
    """What the Hugging Face learner finds."""
    return _expected(repr(settings))


def assert_equal(found: dict, wanted: dict) -> None:
    for key in ("log_probs", "entropy"):
        torch.testing.assert_close(found[key], wanted[key], atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
    for key in ("state_norm", "update_ratio"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-5, nan_ok=True), key
    assert found["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in wanted["gradients"].items():
        scale = float(gradient.abs().max())
        difference = float((found["gradients"][name] - gradient).abs().max())
        assert difference <= 1e-5 * scale, f"{name}: {difference / max(scale, 1e-30):.1e} of {scale:.1e}"
    norm = float(torch.nn.utils.get_total_norm(list(wanted["gradients"].values())))
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_log_probs_and_gradients_are_the_learners(layout):
    variants = [{"arch": "qwen2"}, {"arch": "llama"}]
    for rank in run_on_ranks(replays, layout, variants):
        for variant, found in zip(variants, rank, strict=True):
            assert_equal(found, expected(**variant))


def test_every_option_and_architecture():
    layout = Layout(tensor=2, pipeline=2, sequence_parallel=True)
    rank, *_ = run_on_ranks(replays, layout, VARIANTS)
    for variant, found in zip(VARIANTS, rank, strict=True):
        assert_equal(found, expected(**variant))


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_the_learner_it_is_compared_with_agrees_with_the_oracle(arch):
    layout = Layout(arch=arch)
    oracle, found = Oracle(hf_model(layout)), expected(arch=arch)
    assert min(layout.responses) >= 3 * 8, "three windows"
    for b, (prompt, response) in enumerate(zip(*batch(layout), strict=True)):
        logits = [oracle.start(prompt.tolist()), *(oracle.feed(t) for t in response.tolist()[:-1])]
        log_probs = (torch.stack(logits) / 0.7).log_softmax(-1).gather(1, response[:, None])[:, 0]
        assert (found["log_probs"][b, : len(response)] - log_probs).abs().max() <= 1e-5


def test_gradients_of_data_parallel_ranks_are_averaged():
    halves = [{"prompts": (5,), "responses": (31,)}, {"prompts": (17,), "responses": (44,)}]
    found = run_on_ranks(replay_half, Layout(data=2), halves)
    wanted = [expected(**half)["gradients"] for half in halves]
    for name in wanted[0]:
        mean = (wanted[0][name] + wanted[1][name]) / 2
        for rank in found:
            torch.testing.assert_close(rank["gradients"][name], mean, atol=1e-5 * float(mean.abs().max()), rtol=0)


def test_a_new_adapter_is_the_same_however_it_is_spread():
    one, *_ = run_on_ranks(new_adapter, Layout())
    for layout in (Layout(tensor=2), Layout(pipeline=2)):
        for rank in run_on_ranks(new_adapter, layout):
            assert rank.keys() == one.keys()
            assert all(torch.equal(rank[name], one[name]) for name in one)
    names = [name for name in one if "lora_A" in name or "W_K" in name]
    assert len({float(one[name][0, 0]) for name in names}) == len(names), "every layer starts differently"


def test_several_replays_of_one_step_add_up_before_ranks_are_reduced():
    """Two micro-batches: what is owed to other ranks is settled once, with the last."""
    parts = [{"prompts": (5,), "responses": (31,)}, {"prompts": (17,), "responses": (44,)}]
    found, *_ = run_on_ranks(two_replays, Layout(tensor=2, sequence_parallel=True), parts)
    wanted = [expected(**part)["gradients"] for part in parts]
    for name, gradient in found.items():
        total = wanted[0][name] + wanted[1][name]
        torch.testing.assert_close(gradient, total, atol=1e-5 * float(total.abs().max()), rtol=0)


def test_saved_activations_do_not_grow_with_the_response():
    """On either stage of a pipeline, whose first holds two calls at a time."""
    layout = Layout(pipeline=2, pte={"window": 64, "block_size": 16})
    for (short, short_store), (long, long_store) in run_on_ranks(saved_bytes, layout, (256, 2048)):
        assert short > 0 and long <= 1.02 * short
        assert long_store > 5 * short_store  # the store is what grows


def test_an_offloaded_base_is_no_hindrance():
    """What is sent and saved is the adapter's alone."""
    for names in run_on_ranks(without_base, Layout(pipeline=2)):
        assert len(names) == 4 * (7 * 2 + 6)


def test_the_untouched_base_and_a_full_cache():
    found, *_ = run_on_ranks(reference, Layout(tensor=2, pipeline=2))
    layout = Layout()
    model = hf_model(layout)
    with model.disable_adapter():
        wanted = Replay(model, *batch(layout), schedule=model.peft_config["default"].schedule().full()).forward()
    torch.testing.assert_close(found, wanted.log_probs, atol=1e-5, rtol=0)
