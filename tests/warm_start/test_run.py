"""A run of ``verl-pte warm-start``: what falls, what it leaves, what it says, and what ends it."""

import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from verl_run import PTE
from warm_start_run import STEPS, log, run

from verl_pte import SamplingParams
from verl_pte.cli import app
from verl_pte.distill import SelfDistillation
from verl_pte.distill.prompts import read_prompts


def test_the_divergence_falls(whole):
    records = log(whole)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["kl"] < 0.75 * records[0]["kl"], records
    assert all(record["grad_norm"] > 0 and record["tokens"] == records[0]["tokens"] for record in records)
    assert all(record["update_ratio"] > 0 for record in records), "answers are longer than the window"
    assert records[1]["lr"] == 1e-2 and records[-1]["lr"] == pytest.approx(1e-3)
    assert (whole / "kl.png").stat().st_size > 0
    left = {path.name for path in whole.iterdir()}
    assert left == {"adapter", "kl.png", "log.jsonl", "settings.json"}, "a finished run keeps no checkpoint"


def test_the_adapter_is_what_was_trained(whole, folder):
    """It loads, and the next KL on the same answers is below the last one that was logged."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, whole / "adapter", is_trainable=True)
    assert model.peft_config["default"].window == PTE["window"]
    distillation = SelfDistillation(model, tokenizer, max_num_seqs=5, max_prompt_length=64, max_response_length=40)
    prompts = read_prompts(str(folder / "prompts.parquet"), "prompt", tokenizer, 64).token_ids

    answers = distillation.rollouts(prompts, SamplingParams(temperature=0, max_tokens=40))
    found = distillation.backward(prompts, [answer.token_ids for answer in answers])
    assert found.num_tokens == log(whole)[-1]["tokens"]
    assert found.divergence < log(whole)[-1]["kl"]


def test_the_adapter_generates(whole, folder):
    named = ["--model", str(folder / "model"), "--adapter", str(whole / "adapter"), "--dtype", "float32"]
    result = CliRunner().invoke(app, ["generate", *named, "--prompt", "1 + 7 =", "--max-tokens", "30"])
    assert result.exit_code == 0 and f"cache_limit={32 + PTE['window']}" in result.output, result.output


def test_a_finished_run_says_so(whole, folder):
    before = (whole / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    result = run(folder, whole)
    assert result.exit_code == 0 and "this run has finished" in result.output
    assert (whole / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_answers_that_fit_into_the_window_are_said_to_teach_nothing(folder, tmp_path):
    short = ("--max-response-length=12", "--steps=1", "--warmup-steps=0")
    result = run(folder, tmp_path / "out", *short)
    assert result.exit_code == 0 and "no answer outgrew the window of 16 tokens" in result.output
    without_memory = run(folder, tmp_path / "lora_c", *short, "--pte=freeze_state=true")
    assert without_memory.exit_code == 0 and "outgrew" not in without_memory.output


def test_a_gradient_that_is_not_finite_ends_the_run(folder, monkeypatch):
    backward = SelfDistillation.backward

    def broken(self, *args, **kwargs):
        found = backward(self, *args, **kwargs)
        next(p for p in self.model.parameters() if p.requires_grad).grad.fill_(math.nan)
        return found

    monkeypatch.setattr(SelfDistillation, "backward", broken)
    result = run(folder, folder / "nan")
    assert result.exit_code == 1 and "step 1: the gradient's norm is nan" in result.output
    assert not (folder / "nan" / "adapter").exists()
