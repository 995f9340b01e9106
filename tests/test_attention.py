"""Every attention backend gives the results of sdpa: rollout, log-probs and gradients.

flash-attn needs a GPU and its package; without them plain functions with its documented meaning take its place, so
what is tested here is what we hand to it. flex_attention runs without its compilation, and PyTorch has its backward on
GPUs alone.
"""

import importlib.util
import sys
import types

import pytest
import torch
from test_agreement import check_agreement
from tiny import random_tokens, tiny_model, tiny_pte

from verl_pte import RolloutEngine, SamplingParams
from verl_pte.core import flash
from verl_pte.core.attention import BACKENDS
from verl_pte.engine import attention, flash_decode
from verl_pte.learner import Replay

GPU = torch.cuda.is_available()
WITH_FLASH = GPU and importlib.util.find_spec("flash_attn") is not None
LENGTHS = ((5, 30), (19, 3), (3, 1), (14, 26))


@pytest.fixture
def flash_calls(monkeypatch):
    """flash-attn's functions by its documentation.

    varlen: one sequence after the other, causal from the bottom right. with_kvcache: of each row of `cache_batch_idx`
    the keys from `cache_leftpad` to `cache_seqlens`; zeros and an infinite log-sum-exp where there are none.
    """
    calls, decodes = [], []

    def with_kvcache(q, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, softmax_scale, return_softmax_lse):
        assert return_softmax_lse and k.stride(-1) == v.stride(-1) == q.stride(-1) == 1
        for index in (cache_seqlens, cache_batch_idx, cache_leftpad):
            assert index.dtype == torch.int32 and index.is_contiguous()
        assert len(q) == len(cache_seqlens) == len(cache_batch_idx) == len(cache_leftpad)
        decodes.append((cache_seqlens - cache_leftpad).tolist())
        at = torch.arange(k.shape[1])
        unseen = ((at < cache_leftpad[:, None]) | (at >= cache_seqlens[:, None]))[:, None, None]
        ka, va = (t[cache_batch_idx].repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        scores = (torch.einsum("aqhd,akhd->ahqk", q, ka) * softmax_scale).masked_fill(unseen, -torch.inf)
        empty = (cache_leftpad == cache_seqlens)[:, None, None]
        out = torch.einsum("ahqk,akhd->aqhd", scores.softmax(-1).nan_to_num(), va)
        return out, scores.logsumexp(-1).masked_fill(empty, torch.inf)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False):
        assert causal and cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
        assert (cu_q[0], cu_q[-1], cu_k[0], cu_k[-1]) == (0, len(q), 0, len(k))
        counts = torch.stack([cu_q.diff(), cu_k.diff()])
        assert counts.amax(1).tolist() == [max_q, max_k] and (counts[0] <= counts[1]).all()
        calls.append(counts.T.tolist())
        outs = []
        for b, (queries, keys) in enumerate(counts.T.tolist()):
            at_q, at_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            kb, vb = (t[at_k].repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[at_q], kb) * softmax_scale
            unseen = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
            outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), vb))
        return torch.cat(outs)

    functions = {"flash_attn_varlen_func": varlen, "flash_attn_with_kvcache": with_kvcache}
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(**functions))
    return types.SimpleNamespace(many=calls, decode=decodes)


def with_backend(backend, arch="qwen2", head_dim=8, **knobs):
    """A tiny model switched to a backend after it was made: transformers itself asks for the package when it is."""
    model = tiny_model(arch, hidden_size=4 * head_dim, head_dim=head_dim)
    model.config._attn_implementation = backend
    return tiny_pte(model=model, chunk_tokens=7, **knobs)


@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("arch", ["qwen2", "llama", "qwen3", "mistral"])
def test_flash_attention_agrees_with_the_oracle(arch, window, flash_calls):
    check_agreement(with_backend("flash_attention_2", arch, window=window))
    assert any(len(call) > 1 for call in flash_calls.many)
    assert any(keys > queries > 1 for call in flash_calls.many for queries, keys in call)  # a past, and several tokens
    runs_of_rows = [row for call in flash_calls.decode for row in torch.tensor(call).view(-1, 3).T]
    assert {int((row > 0).sum()) for row in runs_of_rows} == ({1, 2} if window else {1})


def test_flash_decode_agrees_where_the_gap_lies_across_the_end_of_the_ring(flash_calls):
    model = with_backend("flash_attention_2", "llama", window=20, evict_fraction=0.33)
    schedule = model.peft_config["default"].schedule()
    assert schedule.window % schedule.chunk
    check_agreement(model)


def test_runs_of_slots():
    visible = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]]).bool()
    runs = flash_decode.Runs.of(visible[:, None, None], window=4)
    assert runs.rows_A.tolist() == [0, 1, 2, 3] * 2
    pairs = torch.stack([runs.first_A, runs.end_A], -1).view(2, 4, 2).transpose(0, 1).tolist()
    expected = [[(0, 2), (3, 5)], [(5, 6)], [(0, 6)], [(1, 3)]]
    assert [[tuple(run) for run in row if run[0] < run[1]] for row in pairs] == expected


@pytest.mark.parametrize(
    "window, fraction, block, most",
    [(8, 0.25, 4, 2), (20, 0.33, 4, 2), (7, 0.5, 1, 2), (9, 0.99, 1, 1), (None, 0.25, 4, 1)],
)
def test_no_row_ever_sees_more_runs_than_are_asked_for(window, fraction, block, most):
    model = tiny_pte("qwen2", window, evict_fraction=fraction, block_size=block)
    engine = RolloutEngine(model, max_num_seqs=3, max_prompt_length=9, max_response_length=70)
    seen, begin_decode = set(), engine.cache.begin_decode

    def begin(position_B):
        visible = begin_decode(position_B)
        edges = torch.nn.functional.pad(visible[position_B >= 0, 0, 0].int(), (1, 1)).diff()
        seen.update((edges == 1).sum(1).tolist())
        return visible

    engine.cache.begin_decode = begin
    engine.generate(random_tokens(1, 9, 4, 6), [SamplingParams(max_tokens=n, temperature=0) for n in (70, 50, 9, 61)])
    assert seen == set(range(1, most + 1))


def test_torch_compile_is_refused_with_flash_attention():
    with pytest.raises(ValueError, match="compile=True: torch.compile cannot follow flash-attn's decoding kernel"):
        model = with_backend("flash_attention_2")
        RolloutEngine(model, max_num_seqs=1, max_prompt_length=8, max_response_length=8, compile=True)


@pytest.mark.parametrize("window", [8, None])
@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
def test_agrees_with_the_oracle(backend, window):
    with torch.compiler.set_stance("force_eager"):
        check_agreement(with_backend(backend, window=window))


def gradients(backend, device="cpu", dtype=torch.float32, **sizes):
    model = with_backend(backend, **sizes).to(device, dtype)
    pairs = [random_tokens(*pair, seed=sum(pair)) for pair in LENGTHS]
    replay = Replay(model, *([torch.tensor(pair[i]) for pair in pairs] for i in range(2)))
    out = replay.forward()
    weight = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(0)).to(device)
    replay.backward(weight * out.mask)
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def check_gradients(backend, bound, **where):
    expected = gradients("sdpa", **where)
    for name, gradient in gradients(backend, **where).items():
        assert (gradient - expected[name]).norm() <= bound * expected[name].norm(), name


def test_gradients_of_eager():
    check_gradients("eager", 1e-5)


def test_gradients_of_flash_attention(flash_calls):
    check_gradients("flash_attention_2", 1e-5)


def test_a_call_in_which_every_row_idles_has_gradients(flash_calls):
    # Under FSDP a rank with fewer calls than others runs such; its layers must still be part of the graph.
    visible = torch.eye(3, dtype=torch.bool).expand(2, 1, 3, 3)
    packing = flash.Packing.of(visible, torch.zeros(2, 3, dtype=torch.bool))
    query, key, value = (torch.randn(2, 4, 3, 8, requires_grad=True) for _ in range(3))
    out, _ = flash.flash_attention(torch.nn.Module(), query, key, value, None, packing, scaling=1.0)
    out.sum().backward()
    assert out.shape == (2, 3, 4, 8) and all(t.grad is not None for t in (query, key, value))


def test_packing():
    # Two rows of two queries and six slots; the second query of the second row is padding and sees the padding slot.
    visible = torch.tensor([[[1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0]], [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]])
    packing = flash.Packing.of(visible[:, None].bool(), torch.tensor([[True, True], [True, False]]))
    assert packing.queries_M.tolist() == [0, 1, 2]
    assert packing.keys_P.tolist() == [0, 1, 3, 4, 6 + 1]
    assert (packing.query_starts.tolist(), packing.key_starts.tolist()) == ([0, 2, 3], [0, 4, 5])
    assert (packing.most_queries, packing.most_keys) == (2, 4)


@pytest.mark.skipif(not GPU, reason="PyTorch has flex_attention's backward on GPUs alone")
def test_gradients_of_flex_attention_on_a_gpu():
    check_gradients("flex_attention", 1e-4, device="cuda", head_dim=16)  # the least it takes there


@pytest.mark.skipif(not WITH_FLASH, reason="needs a GPU and the flash-attn package")
def test_a_decode_step_of_flash_attention_on_a_gpu():
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(5, 8, 1, 64), (5, 2, 3000, 64), (5, 2, 3000, 64)]  # many blocks of keys, so that flash-attn splits them
    query, key, value = (torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes)
    visible = torch.ones(5, 3000, dtype=torch.bool, device="cuda")
    for row, gaps in enumerate([((7, 9), (2000, 3000)), ((0, 2999),), (), ((3, 3000),), ((0, 40), (900, 1100))]):
        for gap in gaps:
            visible[row, slice(*gap)] = False
    module, visible = torch.nn.Module(), visible[:, None, None]
    runs = flash_decode.Runs.of(visible, window=2000)
    found, _ = flash_decode.flash_decode(module, query, key, value, None, runs, scaling=0.125)
    expected, _ = attention.decode_attention(module, query, key, value, visible, scaling=0.125)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not WITH_FLASH, reason="needs a GPU and the flash-attn package")
@pytest.mark.parametrize("window", [8, None])
def test_a_cuda_graph_holds_flash_attention(window):
    model = with_backend("flash_attention_2", window=window).to("cuda", torch.bfloat16)
    sizes = dict(max_num_seqs=2, max_prompt_length=19, max_response_length=40)
    engines = [RolloutEngine(model, **sizes, cuda_graph=graph) for graph in (True, False)]
    sampling = SamplingParams(max_tokens=40, temperature=0)
    captured, eager = ([o.log_probs for o in e.generate(random_tokens(5, 19, 3), sampling)] for e in engines)
    assert captured == eager


@pytest.mark.skipif(not WITH_FLASH, reason="needs a GPU and the flash-attn package")
def test_gradients_of_flash_attention_on_a_gpu():
    check_gradients("flash_attention_2", 3e-2, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollout_leaves_the_choice_as_it_was(backend, flash_calls):
    model = with_backend(backend)
    engine = RolloutEngine(model, max_num_seqs=2, max_prompt_length=8, max_response_length=20)
    with torch.compiler.set_stance("force_eager"):
        engine.generate(random_tokens(7, 5), SamplingParams(max_tokens=6, temperature=0))
    assert model.config._attn_implementation == backend
