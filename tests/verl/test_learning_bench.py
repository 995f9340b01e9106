"""The learning benchmark's GRPO in verl: main_ppo starts from the cell's adapter and scores as the task does."""

import json
from pathlib import Path

import pytest
import torch
from verl.workers.config import HFModelConfig  # noqa: F401  this file needs verl

from verl_pte.bench.learning import words
from verl_pte.bench.learning.base import BaseSettings, base_path, untrained
from verl_pte.bench.learning.cells import Cell, run
from verl_pte.bench.learning.reward import compute_score
from verl_pte.bench.learning.tasks import Task


def test_words_are_tokens_and_the_reward_is_the_tasks(tmp_path) -> None:
    import pyarrow.parquet as pq

    task = Task("tracking")
    examples = task.examples([3, 12], torch.Generator().manual_seed(0))
    words.write_prompts(examples, "tracking", tmp_path / "p.parquet")
    tokenizer = words.tokenizer(task)
    for row, example in zip(pq.read_table(tmp_path / "p.parquet").to_pylist(), examples, strict=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert prompt == example.prompt
        truth = row["reward_model"]["ground_truth"]
        wrong = list(example.thought)
        wrong[-2] = (wrong[-2] + 1) % 10
        for thought, score in ((example.thought, 1.0), (wrong, 0.75)):
            decoded = tokenizer.decode(thought, skip_special_tokens=True)
            assert compute_score(words.DATA_SOURCE, decoded, truth) == score == task.score(example, thought).answer


def test_cell_runs_in_verl(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = Path("results")  # relative, as one types it
    small = BaseSettings(hidden_size=32, layers=1)
    untrained(Task("lookup"), small).save_pretrained(base_path(Task("lookup"), small, results / "bases"))
    cell = Cell("lookup", "pte", "main_ppo", warm=2, steps=2, lr=1e-3, tests=4, works=(10, 11), base=small, kl=0.1)
    found = run(cell, results)
    assert "failure" not in found, found["failure"]
    (block,) = found["curve"]
    assert block["mismatch"] <= 1e-5 and block["length"] > 1 and block["kl"] > 0
    assert block["lr"] == pytest.approx((1e-4 + 2e-4) / 2)  # a warm-up of ten steps
    (log,) = results.glob("main_ppo/*/metrics.jsonl")
    assert {json.loads(line)["data"]["actor/kl_coef"] for line in log.read_text().splitlines()} == {0.1}
    # Two steps of Adam away from the adapter of the warm start: a new one would be further.
    warm, start, end = (
        torch.cat([t.flatten() for _, t in sorted(_tensors(path).items())])
        for path in (
            next(results.glob("adapters/*")),
            next(results.glob("main_ppo/*/start")),
            next(results.rglob("pte_adapter")),
        )
    )
    assert torch.equal(warm, start)
    assert 1e-4 < (end - start).abs().max() < 4.5e-4


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
