"""Attention of decode steps: transformers' results without its copies, and only where it belongs."""

import pytest
import torch
from tiny import random_tokens, tiny_model, tiny_pte
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from verl_pte import RolloutEngine, SamplingParams
from verl_pte.core.attention import selected
from verl_pte.engine import attention


class Grouped(torch.nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@torch.no_grad()
def test_same_as_transformers(kv_heads):
    torch.manual_seed(0)
    query = torch.randn(3, 6, 1, 8)
    key, value = torch.randn(2, 3, kv_heads, 11, 8)
    mask = torch.rand(3, 1, 1, 11) < 0.5
    mask[..., 0] = True
    module = Grouped(6 // kv_heads)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    out, _ = attention.decode_attention(module, query, key, value, mask, scaling=0.3)
    assert out.shape == expected.shape == (3, 1, 6, 8)
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_decode_steps_alone_take_it(attn, monkeypatch):
    calls, original = [], attention.decode_attention
    monkeypatch.setitem(
        attention.AttentionInterface._global_mapping,
        attention.NAME,
        lambda module, query, *args, **kwargs: calls.append(query.shape[2]) or original(module, query, *args, **kwargs),
    )
    model = tiny_pte(model=tiny_model("llama", attn=attn))
    engine = RolloutEngine(model, max_num_seqs=2, max_prompt_length=8, max_response_length=20)
    engine.generate(random_tokens(7, 5), SamplingParams(max_tokens=6, temperature=0))
    assert calls == ([1] * 2 * 5 if attn == "sdpa" else [])  # two layers, five decode steps
    assert model.config._attn_implementation == attn


def test_selection_ends_with_an_error():
    config = tiny_model("qwen2").config
    with pytest.raises(KeyError), selected(config, attention.REPLACES):
        assert config._attn_implementation == attention.NAME
        raise KeyError
    assert config._attn_implementation == "sdpa"
