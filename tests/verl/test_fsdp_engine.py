"""The training engine: two FSDP2 ranks over gloo equal one process, for every kind of pass verl asks for."""

import functools
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from verl_engine_run import RESPONSE_LENS, TEMPERATURE, exercise, make_batch

import verl_pte.peft  # noqa: F401  registers the method with PEFT
from verl_pte.cli import app


@pytest.fixture(scope="module")
def results(folder):
    """(of one process, of each of two ranks)"""
    for world in (1, 2):
        mp.spawn(exercise, args=(world, folder), nprocs=world)
    load = functools.partial(torch.load, weights_only=False)
    return load(folder / "result1_0.pt"), [load(folder / f"result2_{rank}.pt") for rank in range(2)]


def assert_same(left: dict, right: dict, tolerance: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_adapter_starts_equal_on_all_ranks_and_runs(results):
    one, two = results
    for rank in two:
        assert_same(one["start"], rank["start"], tolerance=0)


def test_weights_after_two_steps(results):
    one, two = results
    moved = max(float((one["end"][name] - one["start"][name]).abs().max()) for name in one["end"])
    assert moved > 1e-3, "the steps must move the weights by far more than they are compared to"
    for rank in two:
        assert_same(one["end"], rank["end"])


def test_gradients_reach_every_part_of_the_adapter(results):
    one, _ = results
    still = [name for name, tensor in one["end"].items() if torch.equal(tensor, one["start"][name])]
    assert not still, still


def test_gradient_norm_and_schedule(results):
    one, two = results
    for step in range(2):
        norms = [r[f"metrics {step}"]["grad_norm"] for r in (one, *two)]
        assert norms[0] > 1e-3
        assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-5)
        assert one[f"lr {step}"] == two[0][f"lr {step}"]
    assert one["lr 1"] < one["lr 0"] < 0.1


def test_log_probs(results):
    one, two = results
    assert all(row.ne(0).sum() >= n - 1 for row, n in zip(one["log_probs"], RESPONSE_LENS, strict=True))
    for key in ("log_probs", "dynamic", "reference"):
        both = two[0][key] + two[1][key]
        for ours, theirs in zip(one[key], both, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for fixed, dynamic in zip(one["log_probs"], one["dynamic"], strict=True):
        torch.testing.assert_close(fixed, dynamic, atol=1e-5, rtol=0)


def test_reference_is_the_base_under_the_chosen_cache(results, folder):
    one, _ = results
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    rows = make_batch(slice(None))["input_ids"].unbind()
    for row, n, reference in zip(rows, RESPONSE_LENS, one["full reference"], strict=True):
        with torch.no_grad():
            expected = base(row[None]).logits[0].log_softmax(-1)[:-1].gather(-1, row[1:, None])[:, 0]
        torch.testing.assert_close(reference[-n - 1 : -1], expected[-n:], atol=1e-5, rtol=0)
    windowed = max(float((a - b).abs().max()) for a, b in zip(one["full reference"], one["reference"], strict=True))
    assert windowed > 1e-3, "under the window the reference must differ"


def test_metrics_are_reduced_over_micro_batches_and_ranks(results):
    one, two = results
    ours = one["metrics 0"]
    for key in ("mismatch_mean", "mismatch_max", "state_norm", "update_ratio", "adapter_norm", "cache_limit"):
        for rank in two:
            theirs = rank["metrics 0"][f"pte/{key}"]
            assert theirs == pytest.approx(ours[f"pte/{key}"], rel=1e-5), key
    # The model's log-probs are about log(1/320), the batch's made-up rollout log-probs -5.8: known differences to
    # find again.
    assert ours["pte/mismatch_max"][0] > ours["pte/mismatch_mean"][0] > 0.05
    assert ours["pte/cache_limit"] == [16 + 16]
    norm = sum(float(t.double().square().sum()) for t in two[0]["end"].values()) ** 0.5
    assert two[0]["metrics 1"]["pte/adapter_norm"][0] == pytest.approx(norm, rel=1e-6)


def test_weights_travel_under_the_attached_models_names(results, folder):
    _, two = results
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    attached = PeftModel.from_pretrained(base, folder / "checkpoint2" / "pte_adapter").state_dict()
    assert attached.keys() == two[0]["base"].keys() | two[0]["end"].keys()
    assert all("pte_" in name for name in two[0]["end"]) and not any("pte_" in name for name in two[0]["base"])
    for rank in two:
        assert_same({name: attached[name] for name in rank["end"]}, rank["end"], tolerance=0)
        assert_same({name: attached[name] for name in rank["base"]}, rank["base"], tolerance=0)


REPLAY = """
prompts, responses = torch.load("sequences.pt")
torch.save(verl_pte.replay_log_probs(model, prompts, responses, temperature={temperature}), "log_probs.pt")
"""


def test_an_exported_adapter_gives_the_engines_log_probs(results, folder, tmp_path):
    """Loaded as its card says, in another process: two ranks' checkpoint after two optimizer steps."""
    _, two = results
    shutil.copytree(folder / "checkpoint2", tmp_path / "run" / "global_step_2" / "actor")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2")
    named = ["--output", str(tmp_path / "path/to/this/folder"), "--base", str(folder / "model")]
    exported = CliRunner().invoke(app, ["export", str(tmp_path / "run"), *named])
    assert exported.exit_code == 0 and "verl, at step 2" in exported.output, exported.output

    batch = make_batch(slice(None))
    sequences = [list(batch[key].unbind()) for key in ("prompts", "responses")]
    torch.save(sequences, tmp_path / "sequences.pt")
    card = (tmp_path / "path/to/this/folder/README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    code = block + REPLAY.format(temperature=TEMPERATURE)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]

    rows = two[0]["log_probs"] + two[1]["log_probs"]
    engines = [row[-n - 1 : -1] for row, n in zip(rows, RESPONSE_LENS, strict=True)]
    for ours, theirs in zip(torch.load(tmp_path / "log_probs.pt"), engines, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    references = two[0]["reference"] + two[1]["reference"]
    moved = max(float((a - b).abs().max()) for a, b in zip(rows, references, strict=True))
    assert moved > 1e-3, "the adapter must do far more than is compared to"
