"""On a CUDA device: engine, learner and oracle agree, a graph is what it captured, and the host waits once a token, and
in a replay no more often where there are more calls. tests/test_device.py has the last on a simulated one.

tests/test_attention.py has the attention backends that need one. Skipped where there is none, as in CI.
"""

import warnings
from collections import Counter

import pytest
import torch
from test_agreement import PROMPT_LENGTHS, RESPONSE_LENGTHS, TOLERANCE
from tiny import ARCHITECTURES, random_tokens, tiny_pte

from verl_pte import RolloutEngine, SamplingParams, replay_log_probs
from verl_pte.core.reference import Oracle
from verl_pte.learner import Replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def engine_of(model, **knobs):
    sizes = dict(max_num_seqs=3, max_prompt_length=37, max_response_length=60)
    return RolloutEngine(model, **sizes | knobs)


@pytest.mark.parametrize("window", [8, 32, None])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_engine_and_learner_agree_with_the_oracle_of_the_cpu(arch, window):
    model = tiny_pte(arch, window, chunk_tokens=7)
    prompts = random_tokens(*PROMPT_LENGTHS)
    params = [SamplingParams(temperature=0, max_tokens=n) for n in RESPONSE_LENGTHS]
    oracles = [Oracle(model) for _ in prompts]
    expected = [o.greedy(p, n) for o, p, n in zip(oracles, prompts, RESPONSE_LENGTHS, strict=True)]
    model = model.to("cuda")
    outputs = engine_of(model).generate(prompts, params)
    replayed = replay_log_probs(model, prompts, [tokens for tokens, _ in expected])
    for output, replay, (tokens, log_probs), oracle in zip(outputs, replayed, expected, oracles, strict=True):
        assert output.token_ids == tokens
        assert (torch.tensor(output.log_probs) - log_probs).abs().max() <= TOLERANCE
        assert (replay.cpu() - log_probs).abs().max() <= TOLERANCE
        assert output.num_evictions == oracle.num_evictions


def gradients(model, device):
    model = model.to(device)
    model.zero_grad()
    pairs = [random_tokens(*pair, seed=sum(pair)) for pair in ((5, 30), (19, 3), (3, 1), (14, 26))]
    replay = Replay(model, *([torch.tensor(pair[i]) for pair in pairs] for i in range(2)))
    out = replay.forward()
    weight = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(0)).to(device)
    replay.backward(weight * out.mask)
    assert max(out.num_evictions) > 0
    return {n: p.grad.to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kv_store", ["device", "host"])
def test_gradients_are_those_of_the_cpu(kv_store):
    model = tiny_pte("qwen3", 8, kv_store=kv_store)
    expected = gradients(model, "cpu")
    for name, gradient in gradients(model, "cuda").items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_generates_what_eager_steps_do(dtype):
    model = tiny_pte("llama", 8).to("cuda", dtype)
    sampling = SamplingParams(max_tokens=60, temperature=0.8, top_p=0.9, seed=5)
    outputs = {}
    for graph in (True, False):
        engine = engine_of(model, cuda_graph=graph)
        assert (engine._forward.graph is not None) == graph
        outputs[graph] = [
            (o.token_ids, o.log_probs, o.num_evictions) for o in engine.generate(random_tokens(5, 19, 37), sampling)
        ]
    assert outputs[True] == outputs[False]


def waits(run):
    """Where the host waited for the device, and how often."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message))


def test_a_replays_calls_do_not_wait():
    model = tiny_pte("qwen2", 8).to("cuda")

    def replay(length):
        prompts, responses = ([torch.tensor(t) for t in random_tokens(*n)] for n in ((5, 11), (length, 23)))
        run = Replay(model, prompts, responses, kv_store="device")
        out = run.forward()
        run.backward(out.mask.float())
        return run.num_calls

    replay(40)
    calls: list[int] = []
    short, long = (waits(lambda n=n: calls.append(replay(n))) for n in (40, 80))
    assert calls[1] >= calls[0] + 4 and short and long == short


def test_a_rollout_waits_once_a_token():
    engine = engine_of(tiny_pte("qwen2", 8).to("cuda"))

    def rollout(length):
        engine.generate(random_tokens(3, 13, 7), SamplingParams(max_tokens=length, top_p=0.95, top_k=30, seed=1))

    rollout(20)
    short, long = (waits(lambda n=n: rollout(n)) for n in (20, 50))
    assert sum((long - short).values()) == 30, long - short
