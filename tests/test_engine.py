"""The rollout engine: neighbours, slots, memory, sampling, requests."""

import gc
import math
import weakref

import pytest
import torch
from tiny import VOCAB, random_tokens, tiny_model, tiny_pte

from verl_pte import RolloutEngine, SamplingParams
from verl_pte.core.reference import Oracle
from verl_pte.engine.sampling import sample


@pytest.fixture(scope="module")
def model():
    return tiny_pte("qwen2", 8)


def make_engine(model, rows=3, prompt=24, response=64, **kwargs):
    return RolloutEngine(model, max_num_seqs=rows, max_prompt_length=prompt, max_response_length=response, **kwargs)


def same(a, b):
    assert a.token_ids == b.token_ids
    assert max(abs(x - y) for x, y in zip(a.log_probs, b.log_probs, strict=True)) <= 1e-5
    assert (a.num_evictions, a.peak_cache_tokens) == (b.num_evictions, b.peak_cache_tokens)


def test_alone_among_strangers_and_in_a_reused_slot(model):
    prompts = random_tokens(9, 3, 20, 1, 14, 6)
    params = [SamplingParams(max_tokens=n, seed=i) for i, n in enumerate((50, 30, 64, 7, 41, 25))]
    alone = [make_engine(model, rows=1).generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    crowd = make_engine(model, rows=6).generate(prompts, params)
    engine = make_engine(model, rows=2)  # every row serves several sequences
    reused = engine.generate(prompts, params)
    again = engine.generate(prompts[::-1], params[::-1])[::-1]
    for outputs in zip(alone, crowd, reused, again, strict=True):
        for other in outputs[1:]:
            same(outputs[0], other)
    assert all(o.num_evictions > 3 for o in alone if len(o.token_ids) > 30)


def test_a_finished_sequences_row_is_refilled_at_once(model):
    engine = make_engine(model, rows=2)
    for i, n in enumerate((3, 40, 40)):
        engine.add_request(i, random_tokens(5)[0], SamplingParams(max_tokens=n, temperature=0))
    finished, steps = [], 0
    while engine.has_unfinished:
        finished += [(o.request_id, steps) for o in engine.step()]
        steps += 1
    # Each step decodes a token, the one that prefills gives two: request 2 starts right after request 0 ends.
    assert finished == [(0, 1), (1, 38), (2, 2 + 38)]


def test_memory_is_flat_over_8192_tokens():
    model = tiny_pte(model=tiny_model("llama", layers=1, max_position_embeddings=9000), window=256, block_size=16)
    short = make_engine(model, rows=1, prompt=16, response=1024)
    long = make_engine(model, rows=1, prompt=16, response=8192)
    assert long.cache_bytes == short.cache_bytes
    buffers = [layer.keys.data_ptr() for layer in long.cache.layers]
    prompt = random_tokens(13)[0]
    (output,) = long.generate([prompt], SamplingParams(max_tokens=8192, ignore_eos=True, seed=0))
    assert len(output.token_ids) == 8192
    assert output.num_evictions == (13 + 8191 - 1 - 16 - 256) // 64 + 1
    assert output.peak_cache_tokens == 16 + 256
    assert long.cache_bytes == short.cache_bytes
    assert buffers == [layer.keys.data_ptr() for layer in long.cache.layers]
    (short_output,) = short.generate([prompt], SamplingParams(max_tokens=1024, ignore_eos=True, seed=0))
    assert short_output.token_ids == output.token_ids[:1024]


def test_full_cache_grows_with_the_response_length():
    model = tiny_pte("qwen2", None)
    assert make_engine(model, response=400).cache_bytes > 3 * make_engine(model, response=100).cache_bytes


def test_chunked_prefill_changes_nothing(model):
    prompts = random_tokens(23, 5, 17)
    params = SamplingParams(max_tokens=30, temperature=0)
    whole = make_engine(model).generate(prompts, params)
    chunked = make_engine(tiny_pte("qwen2", 8, chunk_tokens=4)).generate(prompts, params)
    for a, b in zip(whole, chunked, strict=True):
        same(a, b)


def test_compiled_decode_agrees(model):
    prompts = random_tokens(9, 3)
    params = SamplingParams(max_tokens=30, temperature=0)
    eager = make_engine(model, rows=2).generate(prompts, params)
    compiled = make_engine(model, rows=2, compile=True).generate(prompts, params)
    for a, b in zip(eager, compiled, strict=True):
        same(a, b)


def test_seeds_and_n(model):
    prompts = random_tokens(9, 4)
    engine = make_engine(model)
    first = engine.generate(prompts, SamplingParams(max_tokens=20, seed=7, n=3))
    assert [o.prompt_index for o in first] == [0, 0, 0, 1, 1, 1]
    assert [o.token_ids for o in first] == [
        o.token_ids for o in engine.generate(prompts, SamplingParams(max_tokens=20, seed=7, n=3))
    ]
    assert len({tuple(o.token_ids) for o in first}) == 6
    single = engine.generate(prompts[:1], SamplingParams(max_tokens=20, seed=8))  # response 1 of seed 7
    assert single[0].token_ids == first[1].token_ids
    unseeded = [engine.generate(prompts[:1], SamplingParams(max_tokens=20))[0].token_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_stop_tokens(model):
    (prompt,) = random_tokens(9)
    free, _ = Oracle(model).greedy(prompt, 30)
    stop = free[11]
    expected = free[: free.index(stop) + 1]
    engine = make_engine(model)
    (output,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(stop,)))
    assert output.token_ids == expected and output.finish_reason == "stop"
    (output,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=5))
    assert output.token_ids == free[:5] and output.finish_reason == "length"

    class Tokenizer:
        eos_token_id = stop

    engine = make_engine(model, tokenizer=Tokenizer())
    (output,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=30))
    assert output.token_ids == expected and output.finish_reason == "stop"
    (output,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    assert output.token_ids == free


def test_abort_returns_what_was_generated(model):
    engine = make_engine(model, rows=1)
    prompt, other = random_tokens(9, 5)
    engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=40))
    engine.add_request("b", other, SamplingParams(temperature=0, max_tokens=40))
    for _ in range(15):
        engine.step()
    (aborted,) = engine.abort("a")
    assert aborted.finish_reason == "abort"
    assert aborted.token_ids == Oracle(model).greedy(prompt, 16)[0] and aborted.num_evictions > 0
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [o.token_ids for o in outputs] == [Oracle(model).greedy(other, 40)[0]]
    engine.add_request("c", prompt, SamplingParams())
    assert [o.token_ids for o in engine.abort(None)] == [[]] and not engine.has_unfinished


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], {}, "prompt of 0 tokens"),
        ([1] * 25, {}, "max_prompt_length=24"),
        ([1, VOCAB], {}, r"must be in \[0, 61\)"),
        ([1], dict(max_tokens=65), "max_response_length=64"),
    ],
)
def test_requests_that_cannot_be_served(model, prompt, params, says):
    engine = make_engine(model)
    with pytest.raises(ValueError, match=says):
        engine.generate([[1], prompt], SamplingParams(**params))
    assert not engine.has_unfinished, "nothing of a refused batch stays"
    with pytest.raises(ValueError, match=says):
        engine.add_request(0, prompt, SamplingParams(**params))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (dict(temperature=-1), "temperature=-1"),
        (dict(top_p=0), "top_p=0"),
        (dict(top_p=1.1), "top_p=1.1"),
        (dict(top_k=-2), "top_k=-2"),
        (dict(max_tokens=0), "max_tokens=0"),
        (dict(n=0), "n=0"),
    ],
)
def test_sampling_params_are_checked(params, says):
    with pytest.raises(ValueError, match=says):
        SamplingParams(**params)


def test_engine_arguments_are_checked(model):
    with pytest.raises(ValueError, match="max_num_seqs=0"):
        make_engine(model, rows=0)
    with pytest.raises(ValueError, match="max_position_embeddings=512"):
        make_engine(model, response=500)
    with pytest.raises(ValueError, match="no PTE adapter"):
        make_engine(tiny_model("qwen2"))
    with pytest.raises(ValueError, match="2 SamplingParams for 1 prompts"):
        make_engine(model).generate([[1]], [SamplingParams()] * 2)
    engine = make_engine(model)
    engine.add_request(0, [1], SamplingParams())
    with pytest.raises(ValueError, match="request_id=0: already"):
        engine.add_request(0, [1], SamplingParams())
    with pytest.raises(RuntimeError, match="idle engine"):
        engine.generate([[1]], SamplingParams())


def test_weights_by_name(model):
    target = tiny_pte("qwen2", 8, seed=5)
    engine = make_engine(target)
    adapter = {n: p.detach() for n, p in model.named_parameters()}
    (prompt,) = random_tokens(9)
    params = SamplingParams(temperature=0, max_tokens=30)
    before = engine.generate([prompt], params)[0].token_ids
    assert engine.load_weights(adapter.items()) == len(adapter)
    assert engine.generate([prompt], params)[0].token_ids == Oracle(model).greedy(prompt, 30)[0] != before
    with pytest.raises(ValueError, match="no parameter 'nonsense'"):
        engine.load_weights([("nonsense", torch.zeros(1))])
    name = next(iter(adapter))
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        engine.load_weights([(name, torch.zeros(1))])
    engine.add_request(0, prompt, params)
    engine.step()
    for call in (lambda: engine.load_weights([]), engine.sleep):
        with pytest.raises(RuntimeError, match="1 sequences are running"):
            call()


def test_sleep_frees_the_cache_and_wake_restores_it(model):
    engine = make_engine(model)
    engine.generate(random_tokens(9), SamplingParams(max_tokens=30))
    memory = weakref.ref(engine.cache.layers[0].keys)
    gc.disable()  # freed by itself, not some time later by the collector
    try:
        engine.cache, engine._forward = None, None
        assert memory() is None
    finally:
        gc.enable()
    engine = make_engine(model, compile=True)  # a compiled forward refers to itself: sleep collects
    memory = weakref.ref(engine.cache.layers[0].keys)
    engine.sleep()
    assert memory() is None
    engine = make_engine(model)
    (prompt,) = random_tokens(9)
    params = SamplingParams(temperature=0, max_tokens=30)
    expected, size = engine.generate([prompt], params)[0].token_ids, engine.cache_bytes
    engine.sleep()
    assert engine.cache_bytes == 0
    engine.add_request(0, prompt, params)
    with pytest.raises(RuntimeError, match="sleeps"):
        engine.step()
    engine.wake()
    assert engine.cache_bytes == size
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert outputs[0].token_ids == expected


def test_casting_leaves_the_rotary_frequencies_alone():
    model = tiny_pte("llama", 8)
    rotary = model.get_base_model().model.rotary_emb
    expected = rotary.inv_freq.clone()
    engine = make_engine(model, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {engine.cache.layers[0].keys.dtype}
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, expected)


def test_gradients_are_refused_in_the_bounded_cache(model):
    engine = make_engine(model)
    step = engine.cache.plan(None, [None] * 3, [0] * 3)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="inference"):
        engine.cache.begin(step)


def draw(logits, **params):
    """Frequencies of 20,000 draws from one row of logits."""
    n = 20_000
    tokens, log_probs = sample(logits.expand(n, -1), [SamplingParams(**params)] * n, torch.linspace(0, 1, n + 1)[:-1])
    return torch.bincount(tokens, minlength=logits.shape[-1]) / n, log_probs, tokens


def test_sampling_follows_the_distribution():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        frequencies, log_probs, tokens = draw(logits, temperature=temperature)
        assert (frequencies - expected).abs().max() < 1e-3
        assert torch.allclose(log_probs, expected.log()[tokens], atol=1e-6)


def test_top_k_and_top_p_restrict_and_keep_log_probs():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    probabilities = logits.softmax(-1)
    for params, kept in (
        (dict(top_k=2), [0, 2]),
        (dict(top_k=1), [0]),
        (dict(top_p=float(probabilities[0]) + 0.01), [0, 2]),  # the token that crosses the threshold stays
        (dict(top_p=0.01), [0]),
        (dict(top_k=3, top_p=0.5), [0]),
        (dict(top_k=-1), [0, 1, 2, 3, 4]),
        (dict(top_k=99), [0, 1, 2, 3, 4]),
    ):
        frequencies, log_probs, tokens = draw(logits, **params)
        expected = torch.zeros(5)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        assert (frequencies - expected).abs().max() < 1e-3, params
        assert torch.allclose(log_probs, probabilities.log()[tokens], atol=1e-6)


def test_greedy_and_the_last_uniform_number():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, -math.inf]])
    tokens, log_probs = sample(logits, [SamplingParams(temperature=0)] * 2, [0.99, 0.99])
    assert tokens.tolist() == [0, 1] and torch.allclose(log_probs, logits.log_softmax(-1)[[0, 1], [0, 1]])
    mixed, _ = sample(logits, [SamplingParams(temperature=0), SamplingParams()], [0.99, 1.0])
    assert mixed.tolist() == [0, 1], "a token of probability zero is never drawn"
