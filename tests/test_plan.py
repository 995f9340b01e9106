"""`verl-pte plan`: what is counted against what is known, allocated and measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from verl_pte import PTEConfig, RolloutEngine, attach
from verl_pte.cli import app
from verl_pte.plan import PlanSettings, count, estimate
from verl_pte.plan.configs import load_config
from verl_pte.plan.live import LiveMemory, fused_attention

MIB = 2**20


def test_live_memory_counts_what_is_alive_at_once():
    kept = torch.empty(7 * MIB, dtype=torch.uint8)
    with LiveMemory() as live:
        a = torch.empty(3 * MIB, dtype=torch.uint8, device="meta")
        b = a + a
        assert live.now == 6 * MIB
        view = a[:10]
        del a
        assert live.now == 6 * MIB, "the view keeps its storage"
        del view
        assert live.now == 3 * MIB
        kept.add_(1)  # in place, and made before
        b.mul_(2)
        assert live.now == 3 * MIB
        del b
    assert (live.now, live.peak) == (0, 6 * MIB)


def test_fused_attention_keeps_no_matrix_of_pairs():
    def peak(length: int) -> int:
        q, k, v = (torch.empty(1, 2, length, 16, device="meta", requires_grad=True) for _ in range(3))
        with LiveMemory() as live, fused_attention():
            functional.scaled_dot_product_attention(q, k, v).sum().backward()
        return live.peak

    assert peak(2048) < 2.1 * peak(1024)


# Of the models' own cards; an adapter by hand: rank x (inputs + outputs) of seven linears, and three projections and
# three global tensors of the width of keys in every layer.
@pytest.mark.parametrize(
    ("name", "base", "layers", "linears", "kv"),
    [
        ("qwen2.5-3b", 3_085_938_688, 36, [(2048, 2048), (2048, 256)] + [(2048, 256)] + [(2048, 2048)], 256),
        ("qwen2.5-7b", 7_615_616_512, 28, [(3584, 3584), (3584, 512)] + [(3584, 512)] + [(3584, 3584)], 512),
        ("r1-distill-llama-8b", 8_030_261_248, 32, [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)], 1024),
    ],
)
def test_parameters_of_the_papers_models(name, base, layers, linears, kv):
    config, rank = load_config(name), 32
    mlp = [(config.hidden_size, config.intermediate_size)] * 3
    adapter = layers * rank * (sum(i + o for i, o in linears + mlp) + 6 * kv)
    found = count.parameters(config, PTEConfig(rank=rank, num_global_tokens=rank))
    assert (found.base, found.adapter) == (base, adapter)
    assert found.root + layers * found.layer == base
    assert count.parameters(config, PTEConfig(freeze_state=True)).adapter == adapter - layers * rank * 6 * kv


@pytest.mark.parametrize("window", [32, None])
def test_the_cache_is_what_the_engine_allocates(window):
    config = load_config("qwen2.5-3b")
    config.num_hidden_layers, config.vocab_size = 2, 512
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 64, 64, 4
    pte = PTEConfig(rank=4, num_global_tokens=4, window=window, block_size=8)
    model = attach(AutoModelForCausalLM.from_config(config, dtype=torch.float32), pte)
    engine = RolloutEngine(model, max_num_seqs=3, max_prompt_length=21, max_response_length=100)
    assert engine.cache is not None
    assert count.cache_bytes(config, pte, 3, 21, 100, torch.float32) == engine.cache.num_bytes


def test_counts_are_near_what_was_measured():
    """With glibc told to give freed memory back, so that resident memory is what is allocated."""
    glibc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    run = Path(__file__).with_name("plan_run.py")
    environment = os.environ | glibc | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(run.parent)}
    done = subprocess.run([sys.executable, run], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ratios = {name: one["counted"] / one["measured"] for name, one in found.items()}
    assert ratios["pte"] == pytest.approx(1, abs=0.15)
    assert ratios["full"] == pytest.approx(1, abs=0.15)
    assert ratios["prefill"] == pytest.approx(1, abs=0.33)
    # Activations move with neither; the store alone grows with the response (invariant 3).
    assert found["pte"]["measured"] < 0.75 * found["full"]["measured"]


def settings(**changes) -> PlanSettings:
    values = {"config": load_config("qwen2.5-3b"), "pte": PTEConfig()} | changes
    return PlanSettings(**values)


@pytest.fixture(scope="module")
def plan():
    return estimate(settings())


def parts(plan, phase: str) -> dict[str, int]:
    (found,) = [p for p in plan.phases if p.name == phase]
    return {part.name: part.bytes for part in found.parts}


def test_the_learner_grows_with_the_response_by_its_store_alone(plan):
    longer = estimate(settings(response_length=16384))
    short_parts, long_parts = parts(plan, "learner"), parts(longer, "learner")
    token = 2 * 2 * 36 * 2 * 128
    assert long_parts.pop("K/V store") - short_parts.pop("K/V store") == 4 * (16384 - 3072) * token
    states = 4 * ((16384 - 3072) // 256) * 36 * 4 * 32 * 32
    assert long_parts.pop("activations and logits") - short_parts.pop("activations and logits") == states
    assert short_parts == long_parts
    assert parts(longer, "rollout") == parts(plan, "rollout")
    host = parts(estimate(settings(pte=PTEConfig(kv_store="host"))), "learner")
    assert host["K/V store"] == 0 and host["activations and logits"] == parts(plan, "learner")["activations and logits"]


def test_what_is_sharded_and_what_sleeps(plan):
    one = estimate(settings(num_gpus=1))
    assert parts(one, "learner")["learner's shards"] // 8 == parts(plan, "learner")["learner's shards"]
    vllm = estimate(settings(engine="vllm", tensor_parallel=2))
    assert "rollout's weights" not in parts(vllm, "learner")
    assert parts(vllm, "rollout")["vLLM"] == 40 * 2**30
    offloaded = estimate(settings(param_offload=True))
    assert "learner's shards" not in parts(offloaded, "rollout") and "learner's shards" in parts(offloaded, "learner")


def test_the_command_says_what_fits_and_what_does_not():
    run = CliRunner().invoke(app, ["plan", "--model", "qwen2.5-3b"])
    assert run.exit_code == 0 and "fits 80 GiB" in run.output and "NOT" not in run.output
    run = CliRunner().invoke(app, ["plan", "--model", "qwen2.5-3b", "--gpu-memory", "24", "--json"])
    found = json.loads(run.stdout.splitlines()[-1])
    assert run.exit_code == 1 and not found["fits"] and found["phases"]["learner"]["bytes"] > 24 * 2**30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--engine", "sglang"], "--engine sglang: must be one of native, vllm"),
        (["--tensor-parallel", "2"], "--tensor-parallel 2: must be 1, the native engine is data parallel"),
        (["--response-length", "40000"], "= 41024: exceeds the model's max_position_embeddings=32768"),
        (["--pte", "windw=3"], "--pte windw=3: no such setting"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization 1.5: must be between 0 and 1"),
    ],
)
def test_bad_options_are_named(options, message):
    run = CliRunner().invoke(app, ["plan", "--model", "qwen2.5-3b", *options])
    assert run.exit_code == 2 and message in " ".join(run.output.split())


def test_a_model_that_is_nowhere(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = CliRunner().invoke(app, ["plan", "--model", "no/such-model"])
    assert run.exit_code == 2 and "--model no/such-model: neither qwen2.5-3b" in " ".join(run.output.split())
