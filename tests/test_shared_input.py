"""The rollout engine's fused way through the adapters and its stacked encoders, against the plain path."""

import copy

import pytest
import torch
from tiny import ARCHITECTURES, random_tokens, randomize_adapter, tiny_model, tiny_pte

from verl_pte import RolloutEngine, SamplingParams, replay_log_probs
from verl_pte.core.encoder_stack import EncoderStack
from verl_pte.peft import thought_encoders
from verl_pte.peft.layer import PTELinear
from verl_pte.peft.shared_input import SharedInput

TOLERANCE = 1e-5
PROMPTS = (9, 3, 20, 1, 14)
GREEDY = SamplingParams(temperature=0, max_tokens=33)


def make_engine(model, **kwargs):
    return RolloutEngine(model, max_num_seqs=3, max_prompt_length=20, max_response_length=40, **kwargs)


def check(engine, model, prompts=None):
    """What the engine generates has the log-probs of a replay, which takes the plain path."""
    prompts = prompts or random_tokens(*PROMPTS)
    outputs = engine.generate(prompts, GREEDY)
    replayed = replay_log_probs(model, prompts, [o.token_ids for o in outputs])
    for output, replay in zip(outputs, replayed, strict=True):
        assert (torch.tensor(output.log_probs) - replay).abs().max() <= TOLERANCE
    return outputs


@pytest.fixture
def fused_calls(monkeypatch):
    """Counts the linears that took the fused way."""
    calls = []
    add_to = SharedInput.add_to
    monkeypatch.setattr(SharedInput, "add_to", lambda *args: calls.append(args[3]) or add_to(*args))
    return calls


@pytest.mark.parametrize(
    "target_modules",
    [
        "all-linear",
        ["q_proj", "v_proj"],
        ["k_proj"],
        ["o_proj", "up_proj"],
        ["v_proj", "down_proj", "gate_proj"],
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fused_is_plain(arch, target_modules, fused_calls):
    model = tiny_pte(arch, 8, target_modules=target_modules, chunk_tokens=7)
    outputs = check(make_engine(model), model)
    assert any(o.num_evictions > 1 for o in outputs)
    linears = sum(isinstance(m, PTELinear) for m in model.modules())
    assert len(fused_calls) and len(fused_calls) % linears == 0


def test_replays_and_plain_forwards_are_not_fused(fused_calls):
    model = tiny_pte("qwen2", 8)
    make_engine(model)
    replay_log_probs(model, random_tokens(5), random_tokens(20))
    model(torch.tensor(random_tokens(5)))
    assert not fused_calls


def test_one_product_for_linears_that_share_an_input(monkeypatch):
    model = tiny_pte("qwen2", 8)
    engine = make_engine(model)
    calls = []
    products = SharedInput._products
    monkeypatch.setattr(
        SharedInput, "_products", lambda self, *args: calls.append(len(self.loras)) or products(self, *args)
    )
    engine.add_request(0, [1, 2, 3], SamplingParams(max_tokens=2))
    engine.step()
    assert calls == [3, 1, 2, 1] * 2 * 2  # two layers; one prefill, one decode step
    assert all(group._input is None for layer in model.get_base_model().model.layers for group in layer._pte_groups)


@pytest.mark.parametrize("knobs", [dict(), dict(freeze_state=True), dict(update_state=False)], ids=str)
def test_new_weights_reach_the_copies(knobs):
    """By load_weights, by an optimizer in this process, and by new storage."""
    model, other = tiny_pte("qwen2", 8, **knobs), tiny_pte("qwen2", 8, seed=7, **knobs)
    engine = make_engine(model)
    first = check(engine, model)
    engine.load_weights((n, p) for n, p in other.named_parameters() if "pte_" in n)
    second = check(engine, model)
    engine.sleep()
    engine.wake()
    assert [o.token_ids for o in check(engine, model)] == [o.token_ids for o in second]
    engine.sleep()
    engine.load_weights((n, p * 0.5) for n, p in other.named_parameters() if "pte_" in n)
    engine.wake()
    third = check(engine, model)
    randomize_adapter(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pte_encoder" in name:
                parameter.mul_(1.5).add_(0.1)
    fourth = check(engine, model)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    fifth = check(engine, model)
    tokens = [[o.token_ids for o in outputs] for outputs in (first, second, third, fourth, fifth)]
    assert all(a != b for a, b in zip(tokens, tokens[1:], strict=False)), "weights that change nothing show nothing"


def test_encoders_alone_reach_the_stack():
    model = tiny_pte("llama", 8)
    engine = make_engine(model)
    before = check(engine, model)
    for name, parameter in model.named_parameters():
        if "pte_encoder" in name:
            engine.load_weights([(name, torch.randn_like(parameter))])
    after = check(engine, model)
    assert [o.log_probs for o in before] != [o.log_probs for o in after]


def test_adapter_switched_off_and_on():
    model = tiny_pte("qwen3", 8)
    engine = make_engine(model)
    on = check(engine, model)
    with model.disable_adapter():
        off = check(engine, model)
    assert [o.log_probs for o in on] != [o.log_probs for o in off]
    assert [o.log_probs for o in check(engine, model)] == [o.log_probs for o in on]


def test_deep_copies_have_adapters_of_their_own():
    model = tiny_pte("qwen2", 8)
    make_engine(model)  # the original has been fused
    copied = copy.deepcopy(model)
    randomize_adapter(copied, seed=11)
    engine, own = make_engine(copied), make_engine(model)
    theirs, ours = check(engine, copied), check(own, model)
    assert [o.log_probs for o in theirs] != [o.log_probs for o in ours]


def test_parameters_stay_as_they_are():
    model = tiny_pte("qwen2", 8)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    check(make_engine(model), model)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, (address, tensor) in before.items():
        assert after[name].data_ptr() == address and torch.equal(after[name], tensor)


def test_float32_adapter_on_a_bfloat16_base():
    base = tiny_model("llama").bfloat16()
    model = tiny_pte(model=base, window=8)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}
    engine = make_engine(model)
    assert engine.cache.lent_LBRR is engine.cache.states_LBRR
    prompts = random_tokens(*PROMPTS)
    outputs = engine.generate(prompts, GREEDY)
    replayed = replay_log_probs(model, prompts, [o.token_ids for o in outputs])
    differences = torch.cat([torch.tensor(o.log_probs) - r for o, r in zip(outputs, replayed, strict=True)]).abs()
    assert differences.mean() < 0.05


def test_bfloat16_states_are_lent_as_they_are():
    model = tiny_pte("llama", 8)
    engine = make_engine(model, dtype=torch.bfloat16)
    for index, prompt in enumerate(random_tokens(9, 3, 20)):
        engine.add_request(index, prompt, SamplingParams(max_tokens=40, ignore_eos=True))
    for _ in range(20):
        engine.step()
    cache = engine.cache
    assert min(s.num_evictions for s in engine.running) > 1
    assert cache.lent_LBRR.dtype == torch.bfloat16 and cache.states_LBRR.dtype == torch.float32
    assert torch.equal(cache.lent_LBRR, cache.states_LBRR.bfloat16())


@pytest.mark.parametrize(
    "knobs",
    [dict(), dict(normalize="frobenius"), dict(attention="softmax"), dict(update_strength=None)],
    ids=str,
)
@torch.no_grad()
def test_stack_is_the_encoders(knobs):
    model = tiny_pte("qwen2", 8, **knobs)
    encoders = thought_encoders(model.get_base_model())
    stack = EncoderStack(encoders)
    torch.manual_seed(0)
    k_LBEK, v_LBEK = torch.randn(2, 2, 3, 4, 16)
    state_LBRR = stack.initial_LRR[:, None].expand(-1, 3, -1, -1)
    moved = stack.after_eviction(state_LBRR, k_LBEK, v_LBEK)
    by_layer = stack.after_eviction_by_layer(state_LBRR, zip(k_LBEK, v_LBEK, strict=True))
    assert torch.allclose(by_layer, moved, atol=1e-6)
    for layer, encoder in enumerate(encoders):
        initial = encoder.initial_state(3)
        assert torch.allclose(state_LBRR[layer], initial, atol=1e-6)
        expected = encoder.accumulate(initial, encoder.encode(k_LBEK[layer], v_LBEK[layer]))
        assert torch.allclose(moved[layer], expected, atol=1e-5)
