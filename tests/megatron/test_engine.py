"""verl's Megatron engine with PTE: steps, checkpoints and weights, however the model is spread."""

import json
from pathlib import Path

import pytest
import torch
from megatron_engine_run import exercise, fsdp_adapter
from megatron_ranks import Layout, run_on_ranks
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from verl_engine_run import TEMPERATURE, make_batch
from verl_run import make_model

from verl_pte.cli import app
from verl_pte.learner import Replay
from verl_pte.peft.saved import WEIGHTS

TWO = "run/global_step_1/actor"  # as verl's trainer places checkpoints
SPREAD = Layout(tensor=2, pipeline=2, sequence_parallel=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("megatron")
    make_model(path / "model", num_attention_heads=8, num_key_value_heads=4)
    return path


@pytest.fixture(scope="module")
def one(folder) -> dict:
    """Of one process, which also saves `one`."""
    (result,) = run_on_ranks(exercise, Layout(), folder, "one", None, {})
    return result


@pytest.fixture(scope="module")
def saved(folder) -> list[dict]:
    """Of two tensor-parallel ranks, which also save TWO."""
    return run_on_ranks(exercise, Layout(tensor=2), folder, TWO, None, {})


def assert_same(left: dict, right: dict, tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def assert_rows(ours: list, theirs: list, tolerance: float = 1e-5) -> None:
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=0)


def assert_metrics(ours: dict, theirs: dict) -> None:
    """Adam's step hides a gradient that is off by a factor; its norm does not."""
    assert {"grad_norm", "pte/state_norm", "pte/update_ratio", "pte/adapter_norm"} <= theirs.keys() <= ours.keys()
    for key in theirs:
        values = [metric.aggregate() if hasattr(metric, "aggregate") else metric for metric in (ours[key], theirs[key])]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6), key


def test_steps_are_those_of_one_process(one, folder):
    moved = max(float((one["end"][name] - one["start"][name]).abs().max()) for name in one["end"])
    assert moved > 1e-2, "the steps must move the weights by far more than they are compared to"
    results = run_on_ranks(exercise, SPREAD, folder, None, None, {})
    assert [r["log_probs"] is None for r in results] == [True, True, False, False], "only the last stage has log-probs"
    for rank in results:
        assert_same(rank["base"], one["base"], 0)
        assert_same(rank["start"], one["start"], 0)
        assert_same(rank["end"], one["end"], 1e-5)
    last = results[-2]
    for key in ("log_probs", "trained", "reference"):
        assert_rows(last[key], one[key])
    assert_rows(last["reference"], one["log_probs"])  # the base, which a new adapter does not change
    assert max(float((a - b).abs().max()) for a, b in zip(one["trained"], one["reference"], strict=True)) > 1e-2
    for step in range(2):
        ours, theirs = last[f"metrics {step}"], one[f"metrics {step}"]
        assert ours.keys() == theirs.keys()
        assert_metrics(ours, theirs)
        assert last[f"lr {step}"] == one[f"lr {step}"]


def test_data_parallel_ranks_take_the_step_of_one_process(one, folder):
    results = run_on_ranks(exercise, Layout(data=2), folder, None, None, {})
    assert_rows(results[0]["log_probs"] + results[1]["log_probs"], one["log_probs"])
    for rank in results:
        assert_same(rank["end"], one["end"], 1e-5)
        for step in range(2):
            found, wanted = rank[f"metrics {step}"], one[f"metrics {step}"]
            # Those that the engine itself reduces over ranks.
            assert_metrics(found, {key: wanted[key] for key in wanted if key == "grad_norm" or key.startswith("pte/")})


def test_the_base_that_is_handed_out_is_the_hugging_face_models(one, folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in one["base"].items()
    }
    assert_same(plain, dict(base.named_parameters()), 0)


@pytest.mark.parametrize("layout", [Layout(pipeline=2), Layout(tensor=4)], ids=lambda layout: layout.name)
def test_a_checkpoint_goes_on_at_another_size(saved, folder, layout):
    first = saved[0]
    for rank in run_on_ranks(exercise, layout, folder, None, TWO, {}):
        assert_same(rank["start"], first["saved"], 0)
        if rank["log_probs"] is not None:
            assert_rows(rank["log_probs"], first["saved log_probs"])
        # The second step is the uninterrupted run's: optimizer moments and schedule came along.
        assert_same(rank["end"], first["end"], 1e-5)
        assert rank["lr 1"] == first["lr 1"]


def test_half_precision_goes_on_where_it_was(one, folder):
    """The adapter is computed with in bfloat16, and trained in float32."""
    options = {"dtype": "bfloat16"}
    *_, first = run_on_ranks(exercise, SPREAD, folder, "half", None, options)
    assert {t.dtype for t in first["end"].values()} == {torch.bfloat16}
    for key in ("log_probs", "trained"):
        assert_rows(first[key], one[key], 0.05)  # of 250 near-equal tokens, -5.5 or so
    *_, rank = run_on_ranks(exercise, SPREAD, folder, None, "half", options)
    assert_same(rank["start"], first["saved"], 0)
    assert_rows(rank["log_probs"], first["saved log_probs"], 0)
    assert_same(rank["end"], first["end"], 0)


def test_the_saved_adapter_is_peft_and_gives_the_engines_log_probs(saved, folder):
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), folder / TWO / "pte_adapter"
    )
    data = make_batch(slice(None))
    prompts, responses = data["prompts"].unbind(), data["responses"].unbind()
    found = Replay(model, prompts, responses, temperature=TEMPERATURE).forward().log_probs
    for row, response, packed in zip(found, responses, saved[0]["saved log_probs"], strict=True):
        n = len(response)
        torch.testing.assert_close(row[:n], packed[-n - 1 : -1], atol=1e-5, rtol=0)


def test_what_fsdp_exports_of_the_same_weights_is_the_same(saved, folder):
    """Names, tensors and files: what one engine writes and sends is what the other does."""
    tensors = fsdp_adapter(folder, folder / TWO / "pte_adapter", folder / "fsdp")
    assert_same(saved[0]["saved"], tensors, 0)
    ours, theirs = (load_file(folder / name / "pte_adapter" / WEIGHTS) for name in (TWO, "fsdp"))
    assert_same(ours, theirs, 0)
    paths = [folder / name / "pte_adapter" / "adapter_config.json" for name in (TWO, "fsdp")]
    ours, theirs = (json.loads(path.read_text()) for path in paths)
    for config in (ours, theirs):
        config["target_modules"].sort()  # PEFT writes a set
    assert ours == theirs


def test_the_export_command_takes_the_checkpoint(saved, folder, tmp_path):
    (folder / "run" / "latest_checkpointed_iteration.txt").write_text("1")
    output = tmp_path / "exported"
    run = CliRunner().invoke(app, ["export", str(folder / "run"), "--output", str(output), "--base", "some/base"])
    assert run.exit_code == 0, run.output
    exported, kept = load_file(output / WEIGHTS), load_file(folder / TWO / "pte_adapter" / WEIGHTS)
    assert_same(exported, kept, 0)
    assert "verl, at step 1" in (output / "README.md").read_text()


def test_a_foreign_adapter_is_refused(saved, folder):
    with pytest.raises(AssertionError, match=r"adapter: .*lora_A.* has shape \(4, 32\).*check model.pte"):
        run_on_ranks(exercise, Layout(), folder, None, TWO, {"rank": 6})
