"""``verl-pte export``: which adapter a path means, what is refused, and what is written.

That an exported adapter gives the training engine's log-probs is tested in tests/verl/test_fsdp_engine.py.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import random_tokens, tiny_model, tiny_pte
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from verl_pte import PTEConfig, replay_log_probs
from verl_pte.cli import app
from verl_pte.distill.folder import RunFolder
from verl_pte.export.card import card
from verl_pte.versions import installed

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def run(tmp_path) -> Path:
    """Checkpoints of a run at steps 2, 4 and 10, of which 4 is the last complete one, as verl lays them out."""
    tiny_model().save_pretrained(tmp_path / "model")
    for step in (2, 4, 10):
        actor = tmp_path / "run" / f"global_step_{step}" / "actor"
        model = tiny_pte(model=AutoModelForCausalLM.from_pretrained(tmp_path / "model"), seed=step)
        model.save_pretrained(actor / "pte_adapter")
        model.config.save_pretrained(actor / "huggingface")
    (tmp_path / "run" / "global_step_10" / "actor" / "pte_adapter" / WEIGHTS).unlink()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("4")
    return tmp_path / "run"


@pytest.fixture
def warm(run) -> Path:
    """A warm start that has finished."""
    folder = RunFolder(str(run.parent / "warm"))
    folder.claim({"steps": 7, "model": str(run.parent / "model")})
    folder.finish(tiny_pte(model=AutoModelForCausalLM.from_pretrained(run.parent / "model"), seed=5))
    return folder.path


def export(checkpoint: Path | str, output: Path, *more: str, base: str = "nobody/tiny"):
    named = ["--output", str(output), *(["--base", base] if base else [])]
    return CliRunner().invoke(app, ["export", str(checkpoint), *named, *more], env={"COLUMNS": "300"})


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / WEIGHTS)


def damage(adapter: Path, **changed: torch.Tensor | None) -> None:
    """Replace tensors of an adapter, named by how their names end; None drops one."""
    found = tensors(adapter)
    for suffix, tensor in changed.items():
        name = next(name for name in sorted(found) if name.endswith(f"{suffix}.weight"))
        del found[name]
        if tensor is not None:
            found[name] = tensor
    save_file(found, adapter / WEIGHTS)


# -- which adapter
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "step", "options"),
    [
        ("", 4, ()),
        ("", 2, ("--step", "2")),
        ("global_step_2", 2, ()),
        ("global_step_2/actor", 2, ()),
        ("global_step_2/actor/pte_adapter", 2, ()),
    ],
)
def test_checkpoints_of_a_run(run, tmp_path, named, step, options):
    result = export(run / named, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert f"verl, at step {step}, base nobody/tiny" in result.output
    saved, written = tensors(run / f"global_step_{step}" / "actor" / "pte_adapter"), tensors(tmp_path / "out")
    assert saved.keys() == written.keys() and len(saved) > 20
    assert all(torch.equal(saved[name], written[name]) for name in saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "run"], "nothing unfinished is left"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]


@pytest.mark.parametrize("named", ["", "adapter"])
def test_warm_start(warm, tmp_path, named):
    (tmp_path / "out").mkdir()  # an empty folder will do
    result = export(warm / named, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "warm start of 7 steps" in (tmp_path / "out" / "README.md").read_text()


def test_a_saved_adapter_that_says_nothing_about_its_training(run, tmp_path):
    shutil.copytree(run / "global_step_2" / "actor" / "pte_adapter", tmp_path / "alone")
    result = export(tmp_path / "alone", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "| trained by | unknown |" in (tmp_path / "out" / "README.md").read_text()


# -- what is refused
# -----------------------------------------------------------------------------------------------------


def refused(result, message: str, output: Path) -> None:
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not output.with_name(output.name + ".unfinished").exists()
    assert not output.exists() or output.is_file() or [p.name for p in output.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("named", "options", "message"),
    [
        ("run", ("--step", "3"), "has no global_step_3, only 2, 4, 10"),
        ("run", ("--step", "10"), f"has no {WEIGHTS}"),
        ("run/global_step_2", ("--step", "2"), "--step 2: is for the checkpoints of a verl run"),
        ("nowhere", (), "nowhere: no such directory"),
        ("model", (), "model: holds no adapter"),
        ("run", ("--dtype", "float16"), "--dtype float16: must be one of float32, bfloat16"),
        ("run", ("--model", "nowhere/"), "the hub does not give it"),
    ],
)
def test_paths_and_options(run, tmp_path, named, options, message):
    refused(export(tmp_path / named, tmp_path / "out", *options), message, tmp_path / "out")


def test_a_run_that_names_no_complete_checkpoint(run, tmp_path):
    (run / "latest_checkpointed_iteration.txt").unlink()
    refused(export(run, tmp_path / "out"), "say which with --step, of 2, 4, 10", tmp_path / "out")
    assert export(run, tmp_path / "out", "--step", "4").exit_code == 0


def test_an_unfinished_warm_start(warm, tmp_path):
    shutil.rmtree(warm / "adapter")
    refused(export(warm, tmp_path / "out"), "has not finished", tmp_path / "out")


def test_what_is_there_already_is_kept(run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    (tmp_path / "file").touch()
    for name in ("folder", "file"):
        refused(export(run, tmp_path / name), f"{name}: is there already", tmp_path / name)


def test_a_path_does_not_leak_as_the_bases_name(run, tmp_path):
    refused(export(run, tmp_path / "out", base=""), "--base NAME is missing", tmp_path / "out")
    assert export(run, tmp_path / "out").exit_code == 0
    for name in ("README.md", "adapter_config.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    config = run / "global_step_4" / "actor" / "pte_adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "nobody/tiny"}))
    assert export(run, tmp_path / "hub", base="").exit_code == 0
    assert "base_model: nobody/tiny" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_A": None}, "lora_A.weight' is missing"),
        ({"W_K": torch.zeros(3, 16)}, "W_K.weight' is (3, 16), and by"),
        ({"lora_B": torch.full((32, 6), float("nan"))}, "holds infinities or NaN"),
    ],
)
def test_damaged_tensors(run, tmp_path, change, message):
    damage(run / "global_step_4" / "actor" / "pte_adapter", **change)
    refused(export(run, tmp_path / "out"), message, tmp_path / "out")


def test_a_file_that_was_cut_short(run, tmp_path):
    weights = run / "global_step_4" / "actor" / "pte_adapter" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(export(run, tmp_path / "out"), "cannot be read", tmp_path / "out")


def test_another_base_model(run, tmp_path):
    tiny_model(hidden_size=64).save_pretrained(tmp_path / "other")
    result = export(run, tmp_path / "out", "--model", str(tmp_path / "other"))
    refused(result, "the file is damaged, or the base another one", tmp_path / "out")


def test_nothing_appears_when_writing_fails(run, tmp_path, monkeypatch):
    from verl_pte.export import write

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(write, "card", full)
    assert isinstance(export(run, tmp_path / "out").exception, OSError)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert export(run, tmp_path / "out").exit_code == 0  # what the first left is no hindrance


# -- what is written
# -----------------------------------------------------------------------------------------------------


def test_the_card(run, tmp_path):
    assert export(run, tmp_path / "out").exit_code == 0
    text = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["base_model"], head["library_name"]) == ("nobody/tiny", "peft")
    for row in (
        "| window | 8 thought tokens |",
        "| evict fraction | 0.25: 4 tokens at once |",
        "| block size | 4 tokens |",
        "| rank, alpha | 6, 12 |",
        "| adapted modules | down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj |",
        "| thought state | 5 global tokens, updated at every eviction |",
        "| trained by | verl, at step 4 |",
        "| tensors | float32 |",
    ):
        assert row in text, row
    for name, version in installed().items():
        assert f"| {name} | {version} | {version} |" in text
    assert {"verl_pte", "torch", "peft", "transformers"} <= installed().keys()


def test_versions_that_were_not_recorded_are_unknown(run, tmp_path):
    config = run / "global_step_4" / "actor" / "pte_adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    settings["versions"] = {"torch": "2.11.0"}
    config.write_text(json.dumps(settings))
    assert export(run, tmp_path / "out").exit_code == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| torch | 2.11.0 | {installed()['torch']} |" in text
    assert f"| peft | unknown | {installed()['peft']} |" in text
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written == settings | {"base_model_name_or_path": "nobody/tiny"}, "all else stays as it was saved"


def test_the_card_of_baselines():
    def text(**knobs) -> str:
        return card("x/y", PTEConfig(**knobs), modules=["q_proj"], training=None, dtype="float32")

    assert "| thought state | frozen: plain LoRA |" in text(freeze_state=True)
    assert "| thought state | 32 global tokens, fixed |" in text(update_state=False)
    full = text(window=None, freeze_state=True)
    assert "| window | none: full cache |" in full and "bounded" not in full


def test_bfloat16_halves_the_file_and_stays_close(run, tmp_path):
    prompts, responses = random_tokens(5, 9), random_tokens(40, 23, seed=1)

    def log_probs(adapter: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        return torch.cat(replay_log_probs(PeftModel.from_pretrained(base, adapter), prompts, responses))

    assert export(run, tmp_path / "exact").exit_code == 0
    assert export(run, tmp_path / "half", "--dtype", "bfloat16").exit_code == 0
    assert "rounded from float32 to bfloat16" in (tmp_path / "half" / "README.md").read_text()
    for name, tensor in tensors(tmp_path / "half").items():
        exact = tensors(tmp_path / "exact")[name]
        assert tensor.dtype == torch.bfloat16
        assert ((tensor.float() - exact).abs() <= 0.004 * exact.abs()).all(), "what the card says of the rounding"
    saved = log_probs(run / "global_step_4" / "actor" / "pte_adapter")
    assert torch.equal(log_probs(tmp_path / "exact"), saved)
    assert 0 < (log_probs(tmp_path / "half") - saved).abs().max() < 0.1


def test_commands_of_the_documentation(run, warm, tmp_path, monkeypatch):
    """Each as it stands there, where its paths exist."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoints/verl_pte_qwen2.5_3b").mkdir(parents=True)
    shutil.move(run, "checkpoints/verl_pte_qwen2.5_3b/pte_grpo")
    text = (ROOT / "docs" / "export.md").read_text()
    commands = re.findall(r"^    verl-pte (export .+)$", text, flags=re.M)
    assert len(commands) >= 3
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, (command, result.output)
        shutil.rmtree("adapter")
