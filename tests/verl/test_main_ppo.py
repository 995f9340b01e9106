"""Stock ``python -m verl.trainer.main_ppo`` on the tiny recipe: trains, logs, validates, saves, resumes, runs several
replicas.
"""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from verl_run import PTE, make_adapter, train

import verl_pte.peft  # noqa: F401  registers the method with PEFT
from verl_pte.cli import app

RUN = (
    "trainer.save_freq=2",
    "trainer.test_freq=4",
    "trainer.total_training_steps=4",
    "actor_rollout_ref.actor.use_kl_loss=true",
)


def adapter(folder, run: str, step: int):
    return folder / run / f"global_step_{step}" / "actor" / "pte_adapter"


@pytest.fixture(scope="module")
def whole(folder):
    """Metrics of four uninterrupted steps, with checkpoints at 2 and 4."""
    return train(folder, "whole", *RUN)


def test_trains_and_logs(whole):
    steps = [metrics for metrics in whole if "training/global_step" in metrics]
    assert [metrics["training/global_step"] for metrics in steps] == [1, 2, 3, 4]
    for metrics in steps:
        assert 0 <= metrics["pte/mismatch_mean"] <= metrics["pte/mismatch_max"] <= 1e-5
        assert metrics["pte/evictions_per_seq"] > 1  # responses of up to 48 tokens under a window of 16
        assert PTE["window"] < metrics["pte/peak_cache_tokens"] <= metrics["pte/cache_limit"]
        assert metrics["pte/state_norm"] > 0 and metrics["pte/update_ratio"] > 0 and metrics["pte/adapter_norm"] > 0
        assert metrics["actor/grad_norm"] > 0 and "actor/kl_loss" in metrics
        assert not any(key.startswith("actor/pte/") for key in metrics)
    assert steps[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-6), (
        "the reference is the base, which the adapter starts as"
    )
    assert steps[3]["actor/kl_loss"] > 1e-6
    assert len({metrics["pte/adapter_norm"] for metrics in steps}) == 4
    assert any(key.startswith("val-core/digits") for key in steps[3]) and not any(
        key.startswith("val-core") for key in steps[2]
    )


def test_the_adapter_of_a_checkpoint_loads(whole, folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter(folder, "whole", 4))
    assert model.peft_config["default"].window == PTE["window"]
    file = load_file(adapter(folder, "whole", 4) / "adapter_model.safetensors")
    saved, loaded = (
        {name.replace(".default", ""): t for name, t in tensors.items() if "pte_" in name}  # PEFT's name of the adapter
        for tensors in (file, model.state_dict())
    )
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert any(t.abs().max() > 0 for name, t in saved.items() if "lora_B" in name), (
        "training must have moved lora_B off zero"
    )
    base_bytes = (folder / "model" / "model.safetensors").stat().st_size
    shards = [p for p in (folder / "whole").rglob("*") if p.name.startswith("model_world_size")]
    assert not shards and base_bytes, "base weights are not copied into checkpoints"


def test_checkpoints_of_a_run_can_be_exported(whole, folder, tmp_path):
    exported = CliRunner().invoke(
        app, ["export", str(folder / "whole"), "--output", str(tmp_path / "out"), "--base", "nobody/tiny"]
    )
    assert exported.exit_code == 0 and "verl, at step 4, base nobody/tiny" in exported.output, exported.output
    saved, written = (
        load_file(p / "adapter_model.safetensors") for p in (adapter(folder, "whole", 4), tmp_path / "out")
    )
    assert saved.keys() == written.keys() and all(torch.equal(saved[name], written[name]) for name in saved)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| window | {PTE['window']} thought tokens |" in card and "unknown" not in card


def test_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(whole, folder):
    """Also where the recipe names an adapter to start from: the checkpoint wins."""
    start = make_adapter(folder, folder / "unused")
    assert abs(norm_of(start) - whole[2]["pte/adapter_norm"]) > 1, "its weights are others"
    (folder / "resumed").mkdir()
    shutil.copytree(folder / "whole" / "global_step_2", folder / "resumed" / "global_step_2")
    (folder / "resumed" / "latest_checkpointed_iteration.txt").write_text("2")
    logged = train(folder, "resumed", *RUN, f"actor_rollout_ref.model.lora_adapter_path={start}")
    metrics = [m for m in logged if "training/global_step" in m]
    assert [m["training/global_step"] for m in metrics] == [3, 4]
    assert metrics[0]["critic/score/mean"] == pytest.approx(whole[2]["critic/score/mean"], abs=1e-9), "same rollouts"
    two, four, again = (
        load_file(adapter(folder, run, step) / "adapter_model.safetensors")
        for run, step in (("whole", 2), ("whole", 4), ("resumed", 4))
    )
    moved = max(float((four[name] - two[name]).abs().max()) for name in four)
    off = max(float((four[name] - again[name]).abs().max()) for name in four)
    assert moved > 1e-3
    assert off <= 1e-6, f"steps 3 and 4 moved weights by {moved}, the resumed run ended {off} away"


def norm_of(adapter_folder) -> float:
    tensors = load_file(adapter_folder / "adapter_model.safetensors").values()
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def warm_start(folder, window: int) -> Path:
    """The adapter of a short ``verl-pte warm-start`` on the training prompts."""
    named = {"model": folder / "model", "prompts": folder / "train.parquet", "output": folder / "warm"}
    named |= {"steps": 4, "batch-size": 4, "lr": 3e-2, "warmup-steps": 0, "device": "cpu"}
    named |= {"max-prompt-length": 64, "max-response-length": 48}
    knobs = [f"--pte={key}={value}" for key, value in (PTE | {"window": window}).items()]
    result = CliRunner().invoke(app, ["warm-start", *(f"--{key}={value}" for key, value in named.items()), *knobs])
    assert result.exit_code == 0, result.output
    return folder / "warm" / "adapter"


def test_two_replicas_start_from_the_adapter_of_a_warm_start(folder):
    """Two ranks: the second holds no weights when the adapter is loaded, and has to be sent its share."""
    path = warm_start(folder, window=24)
    more = ("trainer.n_gpus_per_node=2", "trainer.total_training_steps=2", "trainer.save_freq=2")
    # `dummy`: the trainer sends the base weights too, so the servers know only what travelled.
    more += ("actor_rollout_ref.rollout.load_format=dummy", f"actor_rollout_ref.model.lora_adapter_path={path}")
    more += ("actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.optim.lr=1e-4")
    metrics = train(folder, "replicas", *more)
    assert [m["training/global_step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert m["pte/mismatch_max"] <= 1e-5, "the first rollouts are the adapter's, not the untrained one's"
        assert m["actor/grad_norm"] > 0
        assert m["pte/cache_limit"] < 64 + 24, "the run's window, not the adapter's"
    assert metrics[0]["pte/adapter_norm"] == pytest.approx(norm_of(path), rel=1e-3)
    assert metrics[0]["actor/kl_loss"] > 1e-4, "the adapter does something, and the reference is still the base"
    began, ended = (load_file(p / "adapter_model.safetensors") for p in (path, adapter(folder, "replicas", 2)))
    assert began.keys() == ended.keys()
    assert 0 < max(float((ended[name] - began[name]).abs().max()) for name in ended) < 1e-3, "two steps of lr 1e-4"
