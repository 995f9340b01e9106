"""GRPO of a cell through verl itself: ``python -m verl.trainer.main_ppo`` on the recipe of tiny models.

The same task, base, adapter, loss and optimizer settings as training.grpo (the encoders have no rate of their own), so
that what this benchmark's short loop shows can be seen in a real run too: verl's controller, sampler, rewards and
optimizer with this package's rollout and learner.

Left out: verl. It runs in processes of its own.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from verl_pte.bench.learning import reward, training, words
from verl_pte.bench.learning.tasks import Task
from verl_pte.config import PTEConfig

# Recipes are of a checkout, not of the installed package.
RECIPES = Path(__file__).resolve().parents[3] / "recipes"
_TAIL = 4000  # characters of a failed run's output
_CURVE = {
    "critic/score/mean": "reward",
    "response_length/mean": "length",
    "actor/lr": "lr",
    "actor/kl_loss": "kl",
    "pte/mismatch_max": "mismatch",
    "actor/grad_norm": "grad_norm",
}


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Attributes:
        pte, adapter: settings and folder of the adapter it starts from.
        folder: for everything the run reads and writes.
        works: work steps of the examples.
    """

    task: Task
    pte: PTEConfig
    adapter: Path
    folder: Path
    works: tuple[int, int]
    settings: training.GRPO
    optimization: training.Optimization
    seed: int


def train(run: Run, base: PreTrainedModel) -> tuple[list[dict[str, float]], Path]:
    """Train; returns measurements of each step and the folder of the trained adapter.

    Raises RuntimeError with the end of verl's output if it fails.
    """
    run = replace(run, folder=run.folder.resolve(), adapter=run.adapter.resolve())  # verl runs in that folder
    task, folder, steps = run.task, run.folder, run.optimization.steps
    folder.mkdir(parents=True, exist_ok=True)
    base.save_pretrained(folder / "base")
    words.tokenizer(task).save_pretrained(folder / "tokenizer")  # beside a Qwen2 transformers would take it for Qwen's
    prompts = run.settings.prompts
    examples = [e for i in range(steps) for e in training.drawn(task, run.works, prompts, run.seed, i)]
    words.write_prompts(examples, task.kind, folder / "train.parquet")
    words.write_prompts(examples[:prompts], task.kind, folder / "val.parquet")
    log = folder / "metrics.jsonl"
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(RECIPES)]
    command += ["--config-name", "pte_tiny_cpu"]
    command += _overrides(run)
    env = os.environ | {"VERL_PLATFORM": "cpu", "VERL_FILE_LOGGER_PATH": str(log), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    trained = folder / "checkpoints" / f"global_step_{steps}" / "actor" / "pte_adapter"
    if done.returncode or not trained.is_dir():
        raise RuntimeError(f"main_ppo ended with status {done.returncode}: {(done.stdout + done.stderr)[-_TAIL:]}")
    records = [json.loads(line)["data"] for line in log.read_text().splitlines()]
    curve = [
        {ours: float(record[theirs]) for theirs, ours in _CURVE.items() if theirs in record}
        for record in records
        if "critic/score/mean" in record
    ]
    return curve, trained


def _overrides(run: Run) -> list[str]:
    pte, folder, settings, optimization = run.pte, run.folder, run.settings, run.optimization
    knobs = {name: getattr(pte, name) for name, _, _ in PTEConfig.knobs() if name != "target_modules"}
    knobs["reference_cache"] = "full" if settings.full_reference else "window"
    values: dict[str, Any] = {
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "val.parquet",
        "data.train_batch_size": settings.prompts,
        "data.max_prompt_length": run.task.prompt_length,
        "data.max_response_length": run.task.thought_length(run.works[1]) + 8,
        "data.seed": run.seed,
        "data.shuffle": False,
        "reward.custom_reward_function.path": reward.__file__,
        "reward.custom_reward_function.name": "compute_score",
        "actor_rollout_ref.model.path": folder / "base",
        "actor_rollout_ref.model.tokenizer_path": folder / "tokenizer",
        "actor_rollout_ref.model.lora_adapter_path": run.adapter,
        **{f"actor_rollout_ref.model.pte.{name}": value for name, value in knobs.items()},
        "actor_rollout_ref.actor.optim.lr": optimization.lr,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": optimization.warmup,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine" if optimization.cosine else "constant",
        "actor_rollout_ref.actor.optim.min_lr_ratio": training.LOWEST,
        "actor_rollout_ref.actor.optim.betas": list(training.BETAS),
        "actor_rollout_ref.actor.ppo_mini_batch_size": settings.prompts,
        "actor_rollout_ref.actor.use_kl_loss": settings.kl > 0,
        "actor_rollout_ref.actor.kl_loss_coef": settings.kl,
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
        "actor_rollout_ref.rollout.n": settings.group,
        "actor_rollout_ref.rollout.max_num_seqs": settings.prompts * settings.group,
        "trainer.logger": "[console,file]",
        "trainer.default_local_dir": folder / "checkpoints",
        "trainer.total_training_steps": optimization.steps,
        "trainer.save_freq": optimization.steps,
        "trainer.resume_mode": "disable",
        "hydra.run.dir": folder / "hydra",
    }
    return [f"{key}={_plain(value)}" for key, value in values.items()]


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
