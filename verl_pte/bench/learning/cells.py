"""One experiment of the report: a cell, and how it is run.

A cell trains one method on one task with one seed and measures greedy answers under the method's own window before,
meanwhile and after. What it found is a JSON file named after it, so a report that was interrupted goes on with the
cells that are missing. Bases, and the distilled adapters that reinforcement learning starts from, are kept beside it
and made anew where they are missing.

Left out: which cells a report has (plan.py) and what is read off them (report.py).
"""

import dataclasses
import functools
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from verl_pte.bench import machine
from verl_pte.bench.learning import main_ppo, training
from verl_pte.bench.learning.base import BaseSettings, TrainingFailure, base_digest, trained_base
from verl_pte.bench.learning.evaluate import accuracy, test_examples
from verl_pte.bench.learning.methods import METHODS, pte_settings
from verl_pte.bench.learning.tasks import Task
from verl_pte.config import PTEConfig
from verl_pte.peft import attach, pte_config

_BASE = "base_digest"  # file beside a kept adapter
BLOCK = 5  # optimizer steps of an entry of a cell's curve
_KNOBS = [knob for knob in PTEConfig.knobs() if knob[0] not in ("kv_store", "chunk_tokens", "reference_cache")]
WAYS = ("supervised", "distilled", "grpo", "main_ppo")  # the last is GRPO too, in verl


@dataclass(frozen=True)
class Cell:
    """One experiment.

    Attributes:
        task, method, seed: of tasks.py and methods.py; the seed is of adapter, examples and samples. One base serves
            all seeds.
        way: one of WAYS.
        warm: optimizer steps of distillation that come before GRPO; 0 is from scratch.
        steps, lr, cosine, encoder_lr: of the optimizer, see training.Optimization.
        batch: examples a step, for supervised and distilled.
        kl, full_reference, rewarded: see training.GRPO.
        works: work steps of the examples trained and tested on.
        far: work steps of further tests after training, far beyond those.
        knobs: PTE settings that differ from the method's.
        base: of the base model.
    """

    task: str
    method: str
    way: str
    seed: int = 0
    warm: int = 0
    steps: int = 400
    lr: float = 3e-3
    cosine: bool = True
    encoder_lr: float = 1.0
    batch: int = 32
    kl: float = 0.0
    full_reference: bool = True
    rewarded: bool = True
    works: tuple[int, int] = (10, 20)
    far: tuple[int, ...] = ()
    tests: int = 256
    knobs: dict[str, Any] = field(default_factory=dict)
    base: BaseSettings = BaseSettings()

    def __post_init__(self) -> None:
        assert self.way in WAYS and self.method in METHODS, (self.way, self.method)
        assert self.rewarded or self.way == "grpo", "verl has no switch for it"

    @property
    def name(self) -> str:
        """Of its file: whatever differs from the defaults, but for the base and further tests."""
        parts = [self.task, self.way, self.method]
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("task", "method", "way", "seed", "far", "knobs", "base") or value == f.default:
                continue
            parts.append(f"{f.name}={'-'.join(map(str, value)) if isinstance(value, tuple) else value}")
        parts += [f"{key}={value}" for key, value in sorted(self.knobs.items())]
        return ".".join([*parts, f"seed={self.seed}"])


def on_file(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """What a cell found when it ran before, with all tests it asks for.

    Raises ValueError if that was with another base or other settings of its method, which names do not tell. A setting
    that was none yet had its default.
    """
    path = _file(cell, folder)
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    asked = _as_in_file({"base": dataclasses.asdict(cell.base), "pte": _pte(cell)})
    defaults = _as_in_file(
        {"base": dataclasses.asdict(BaseSettings()), "pte": {name: value for name, value, _ in _KNOBS}}
    )
    known = {"base": found["cell"]["base"], "pte": found.get("pte", asked["pte"])}  # the latter older files lack
    for part, values in asked.items():
        its = defaults[part] | known[part]
        if other := [f"{k}={its[k]!r}, not {v!r}" for k, v in values.items() if its[k] != v]:
            raise ValueError(f"{path}: its {part} has {', '.join(other)}: remove it, or choose another folder")
    tested = {at["work"] for at in found.get("far", ())}
    return found if "failure" in found or tested >= set(cell.far) else None


def run(cell: Cell, folder: Path, progress: Any = None) -> dict[str, Any]:
    """What a cell found, from its file if it is there.

    `progress` is told what is being done and how many optimizer steps were. Training that fails (gradients that are not
    finite, a base that did not learn) is a finding too: the file says so. Other errors leave no file.
    """
    if (known := on_file(cell, folder)) is not None:
        return known
    path = _file(cell, folder)
    tell = progress or (lambda text, done: None)
    torch.set_num_threads(1)
    start, commit = time.perf_counter(), _commit()
    try:
        found: dict[str, Any] = _train(cell, folder, tell)
    except TrainingFailure as error:
        found = {"failure": str(error)}
    found = {
        "cell": dataclasses.asdict(cell),
        "pte": _pte(cell),
        **found,
        "seconds": time.perf_counter() - start,
        "machine": machine.hardware(),
        "versions": machine.versions(),
        "commit": commit,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.rename(path)
    return found


def _pte(cell: Cell) -> dict[str, Any]:
    """The settings of a cell's method in full, but for those that move memory alone."""
    settings = pte_settings(cell.method, **cell.knobs)
    return {name: getattr(settings, name) for name, _, _ in _KNOBS}


def _as_in_file(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _file(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name}.json"


@functools.cache
def _commit() -> str | None:
    """As this process began: its code stays that, whatever is committed while it works."""
    return machine.commit()


def _train(cell: Cell, folder: Path, tell: Any) -> dict[str, Any]:
    task = Task(cell.task)
    base = trained_base(task, cell.base, folder / "bases", lambda text, done: tell(text, 0))
    digest = base_digest(task, cell.base, folder / "bases")
    if cell.warm:
        model = PeftModel.from_pretrained(base, _warm_adapter(cell, folder, tell), is_trainable=True)
    else:
        torch.manual_seed(cell.seed)
        model = attach(base, pte_settings(cell.method, **cell.knobs))
    examples = test_examples(task, cell.works, cell.tests)
    full = pte_config(model).schedule().full()
    with model.disable_adapter():
        ceiling, floor = accuracy(model, task, examples, full), accuracy(model, task, examples)
    history = [{"step": 0, **accuracy(model, task, examples)._asdict()}]
    curve: list[dict[str, float]] = []
    warmup = 10 if cell.way in ("grpo", "main_ppo") else 20
    optimization = training.Optimization(cell.steps, cell.lr, warmup, cell.cosine, cell.encoder_lr)
    if cell.way == "main_ppo":
        tell(f"{cell.name}: in verl", 0)
        curve, model = _in_verl(cell, model, task, optimization, folder)
        history.append({"step": cell.steps, **accuracy(model, task, examples)._asdict()})
    elif cell.method != "base":
        every = max(1, cell.steps // 8)
        for step, measured in training.optimize(model, optimization, _step(cell, model, task)):
            curve.append(measured)
            if (step + 1) % every == 0 or step + 1 == cell.steps:
                history.append({"step": step + 1, **accuracy(model, task, examples)._asdict()})
            tell(f"{cell.name}: answer {history[-1]['answer']:.2f}", 1)
    if cell.way == "distilled":
        _keep_adapter(model, folder / "adapters" / cell.name, digest)
    far = []
    for work in cell.far:
        further = test_examples(task, (work, work), max(64, cell.tests // 4))
        with model.disable_adapter():
            whole = accuracy(model, task, further, full)
        at = {"work": work, "thought_length": task.thought_length(work), "full_base_answer": whole.answer}
        far.append(at | accuracy(model, task, further)._asdict())
    return {
        "base_digest": digest,
        "full_base": ceiling._asdict(),
        "window_base": floor._asdict(),
        "history": history,
        "far": far,
        "curve": _by_blocks(curve),
    }


def _by_blocks(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """Means over blocks of steps, and of mismatches the largest: files stay small."""
    blocks = [curve[i : i + BLOCK] for i in range(0, len(curve), BLOCK)]
    return [
        {
            key: max(values) if key == "mismatch" else sum(values) / len(values)
            for key in dict.fromkeys(key for step in block for key in step)
            if (values := [step[key] for step in block if key in step])
        }
        for block in blocks
    ]


def _step(cell: Cell, model: nn.Module, task: Task) -> training.Step:
    if cell.way == "supervised":
        return training.supervised(model, task, cell.works, cell.batch, cell.seed)
    if cell.way == "distilled":
        return training.distilled(model, task, cell.works, cell.batch, cell.seed)
    return training.grpo(model, task, cell.works, _grpo(cell), cell.seed)


def _grpo(cell: Cell) -> training.GRPO:
    return training.GRPO(kl=cell.kl, full_reference=cell.full_reference, rewarded=cell.rewarded)


def _in_verl(
    cell: Cell, model: PeftModel, task: Task, optimization: training.Optimization, folder: Path
) -> tuple[list[dict[str, float]], PeftModel]:
    """Train the model's adapter by ``main_ppo``; returns its curve and the trained model."""
    run_folder = folder / "main_ppo" / cell.name.replace("=", "-")  # hydra reads `=` in an override's value
    model.save_pretrained(run_folder / "start")
    pte, base = pte_config(model), model.unload()
    run = main_ppo.Run(task, pte, run_folder / "start", run_folder, cell.works, _grpo(cell), optimization, cell.seed)
    curve, adapter = main_ppo.train(run, base)
    return curve, PeftModel.from_pretrained(base, str(adapter))


def warm_cell(cell: Cell) -> Cell:
    """The distillation a GRPO cell starts from."""
    kept = {key: getattr(cell, key) for key in ("task", "method", "seed", "works", "tests", "knobs", "base")}
    return Cell(**kept, way="distilled", steps=cell.warm)


def _warm_adapter(cell: Cell, folder: Path, tell: Any) -> Path:
    """Folder of the distilled adapter a GRPO cell starts from, trained first if it is not there."""
    warm = warm_cell(cell)
    path = folder / "adapters" / warm.name
    known, base = on_file(warm, folder), base_digest(Task(cell.task), cell.base, folder / "bases")
    of = {_base_of(path), (known or {}).get("base_digest")} - {None, base}
    if of:
        raise RuntimeError(f"{warm.name} is of another base than {folder / 'bases'} has: remove its cell and adapter")
    if not (path / "adapter_model.safetensors").exists():
        if known is not None:  # of an earlier run whose adapters are gone
            _train(warm, folder, tell)
        else:
            run(warm, folder, tell)
    if not (path / "adapter_model.safetensors").exists():
        raise TrainingFailure(f"its warm start failed: {warm.name}")
    return path


def _keep_adapter(model: PeftModel, path: Path, base: str) -> None:
    """All of it or nothing; another process may be making the same. One that is not of this base is replaced."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    model.save_pretrained(scratch)
    (scratch / _BASE).write_text(base)
    if path.exists() and _base_of(path) != base:
        shutil.rmtree(path)
    try:
        scratch.rename(path)
    except OSError:  # it is there
        shutil.rmtree(scratch)


def _base_of(adapter: Path) -> str | None:
    """Digest of the base a kept adapter was trained on; older ones do not say."""
    file = adapter / _BASE
    return file.read_text() if file.exists() else None
