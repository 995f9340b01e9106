"""Attach, save, load, disable, refuse: the tuner through PEFT's own interface."""

import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import ARCHITECTURES, random_tokens, randomize_adapter, tiny_model, tiny_pte
from transformers import GPT2Config, GPT2LMHeadModel
from verl_pte.patches import peft_type

from verl_pte import PTEConfig, attach, replay_log_probs
from verl_pte.core.adapter import add_update

SMALL = dict(rank=4, window=8, block_size=4, num_global_tokens=3)


def with_attention(name):
    model = tiny_model("qwen2")
    model.config._attn_implementation = name
    return model


def log_probs(model):
    return torch.cat(replay_log_probs(model, random_tokens(9, 4), random_tokens(30, 21, seed=1)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attach_starts_as_the_base_and_trains_the_adapter_alone(arch):
    base = tiny_model(arch)
    tokens = torch.tensor(random_tokens(12))
    with torch.no_grad():
        expected = base(tokens).logits
        model = attach(base, PTEConfig(**SMALL))
        assert torch.equal(model(tokens).logits, expected)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if "pte_" in n}
    assert len(trainable) == 2 * (7 * 2 + 6)  # layers x (linears x A, B + encoder)


def test_get_peft_model_is_the_same_thing():
    torch.manual_seed(0)
    a = attach(tiny_model(), PTEConfig(**SMALL))
    torch.manual_seed(0)
    b = get_peft_model(tiny_model(), PTEConfig(**SMALL))
    assert a.state_dict().keys() == b.state_dict().keys() and type(a) is type(b)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path, low_cpu_mem_usage):
    model = tiny_pte("llama", 8, update_strength=0.5, evict_fraction=0.5)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == get_peft_model_state_dict(model).keys()
    assert all("pte_" in name for name in saved), "adapter tensors only"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PTE"
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    config, ours = loaded.peft_config["default"], model.peft_config["default"]
    assert isinstance(config, PTEConfig) and config.schedule() == ours.schedule()
    assert {n: getattr(config, n) for n, *_ in PTEConfig.knobs()} == {
        n: getattr(ours, n) for n, *_ in PTEConfig.knobs()
    }
    assert not any(p.requires_grad for p in loaded.parameters()), "loaded for inference"
    assert torch.allclose(log_probs(loaded), log_probs(model), atol=1e-6)
    trainable = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_disable_adapter_and_back():
    model = tiny_pte("qwen2", 8)
    adapted = log_probs(model)
    base = log_probs(attach(tiny_model("qwen2"), PTEConfig(**SMALL)))
    with model.disable_adapter():
        assert torch.allclose(log_probs(model), base, atol=1e-6)
    assert torch.equal(log_probs(model), adapted) and not torch.allclose(adapted, base, atol=1e-2)
    assert all(p.requires_grad == ("pte_" in n) for n, p in model.named_parameters())


def test_merging_is_refused_with_the_reason():
    model = tiny_pte("qwen2", 8)
    for merge in (
        model.merge_and_unload,
        model.merge_adapter,
        model.base_model.model.model.layers[0].mlp.up_proj.merge,
    ):
        with pytest.raises(ValueError, match="depends on the thought state"):
            merge()


def test_unload_gives_the_base_back():
    model = tiny_pte("qwen2", 8)
    tokens = torch.tensor(random_tokens(12))
    base = model.unload()
    assert not any("pte" in n or "thought" in n for n, _ in base.named_modules())
    with torch.no_grad():
        assert torch.equal(base(tokens).logits, tiny_model("qwen2")(tokens).logits)
    again = attach(base, PTEConfig(**SMALL))  # no hook of the first adapter is left
    randomize_adapter(again)
    assert torch.isfinite(log_probs(again)).all()


def test_target_modules():
    some = tiny_pte("qwen2", 8, target_modules=["q_proj", "down_proj"])
    adapted = {n.split(".pte_adapter")[0].rpartition(".")[2] for n, _ in some.named_parameters() if "pte_adapter" in n}
    assert adapted == {"q_proj", "down_proj"}
    everything = tiny_pte("qwen2", 8)
    assert len([n for n, _ in everything.named_parameters() if "lora_A" in n]) == 2 * 7
    assert not any("lm_head" in n and "pte_" in n for n, _ in everything.named_parameters())


def test_a_frozen_state_has_no_encoder():
    model = tiny_pte("qwen2", 8, freeze_state=True)
    assert not any("encoder" in n for n, _ in model.named_parameters())


def test_half_precision_base_keeps_a_float32_adapter():
    model = attach(tiny_model("qwen2").bfloat16(), PTEConfig(**SMALL))
    assert {p.dtype for n, p in model.named_parameters() if "pte_" in n} == {torch.float32}
    assert log_probs(model).isfinite().all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_update_is_added_whatever_the_adapters_dtype(dtype, in_place):
    torch.manual_seed(0)
    y, h, up = torch.randn(2, 3, 5), torch.randn(6, 4), torch.randn(5, 4)
    expected = y.bfloat16().float() + 2.5 * (h @ up.T).view(2, 3, 5)
    found = add_update(y.bfloat16(), h.to(dtype), up.to(dtype), 2.5, in_place=in_place)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.02)


def test_a_half_precision_adapter_if_it_is_asked_for(tmp_path):
    made = get_peft_model(tiny_model("qwen2").bfloat16(), PTEConfig(**SMALL), autocast_adapter_dtype=False)
    made.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("qwen2").bfloat16(), tmp_path, autocast_adapter_dtype=False)
    for model in (made, loaded):
        assert {p.dtype for n, p in model.named_parameters() if "pte_" in n} == {torch.bfloat16}
        assert log_probs(model).isfinite().all()


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            lambda: attach(tiny_model(), PTEConfig(**SMALL, target_modules=["q_proj", "wq"])),
            r"\['wq'\]: no such linear",
        ),
        (
            lambda: attach(tiny_model(), PTEConfig(**SMALL, target_modules=["lm_head"])),
            r"\['lm_head'\]: no such linear",
        ),
        (
            lambda: attach(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2)), PTEConfig(**SMALL)),
            "'gpt2'.*mistral",
        ),
        (lambda: attach(tiny_model("mistral", sliding_window=64), PTEConfig(**SMALL)), "sliding_window=64"),
        (
            lambda: attach(
                tiny_model("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=0), PTEConfig(**SMALL)
            ),
            "sliding_window=64",
        ),
        (
            lambda: attach(
                tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
                PTEConfig(**SMALL),
            ),
            "rope_type='dynamic'",
        ),
        (lambda: attach(with_attention("paged|eager"), PTEConfig(**SMALL)), "paged.eager.: must be one of sdpa, eager"),
    ],
)
def test_models_it_cannot_serve_are_refused(build, says):
    with pytest.raises(ValueError, match=says):
        build()


def test_a_second_adapter_is_refused():
    model = tiny_pte("qwen2", 8)
    with pytest.raises(ValueError, match="already has a PTE adapter"):
        model.add_adapter("second", PTEConfig(**SMALL))


@pytest.mark.parametrize(
    ("knob", "value", "says"),
    [
        ("window", 1000, "window=1000: must be a multiple of block_size=16, e.g. 992 or 1008"),
        ("evict_fraction", 0, "evict_fraction=0: must lie strictly between 0 and 1"),
        ("evict_fraction", 1.5, "evict_fraction=1.5"),
        ("rank", 0, "rank=0: must be an integer >= 1"),
        ("rank", 1.5, "rank=1.5"),
        ("alpha", 0, "alpha=0: must be a positive number"),
        ("alpha", "x", "alpha='x': must be a positive number"),
        ("alpha", True, "alpha=True"),
        ("alpha", float("inf"), "alpha=inf"),
        ("update_strength", "0.3", "update_strength='0.3'"),
        ("evict_fraction", "0.25", "evict_fraction='0.25'"),
        ("num_global_tokens", -1, "num_global_tokens=-1"),
        ("update_strength", 0, "update_strength=0: must be a positive number, or null"),
        ("update_state", "no", "update_state='no': must be true or false"),
        ("normalize", "rows", "normalize='rows': must be one of row, frobenius"),
        ("attention", "flash", "attention='flash': must be one of linear, softmax"),
        ("gradient", "none", "gradient='none': must be one of full, state, truncated"),
        ("kv_store", "disk", "kv_store='disk': must be one of device, host"),
        ("reference_cache", "x", "reference_cache='x': must be one of window, full"),
        ("chunk_tokens", 0, "chunk_tokens=0"),
        ("target_modules", "q_proj", "target_modules='q_proj': must be `all-linear` or a list"),
        ("target_modules", [], "target_modules="),
    ],
)
def test_knobs_are_checked(knob, value, says):
    with pytest.raises(ValueError) as error:
        PTEConfig(**{knob: value})
    assert says in str(error.value)


def test_the_enum_patch_is_guarded(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    peft_type.apply()  # already there: nothing to do
    monkeypatch.setattr(peft_type.PeftType, "_member_map_", {})
    with pytest.raises(RuntimeError, match="found peft 0.22.0"):
        peft_type.apply()
