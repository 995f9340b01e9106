"""Which adapter a path means: of a verl run, one of its checkpoints, a warm start, or an adapter's own folder.

A verl run keeps ``<run>/global_step_N/actor/pte_adapter`` whatever its engine and sharding (verl/checkpoint.py), and
names the last complete checkpoint in ``<run>/latest_checkpointed_iteration.txt``. Left out: what is in the adapter.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from verl_pte.distill.folder import RunFolder
from verl_pte.peft.saved import ADAPTER_FILES, ADAPTER_FOLDER

_LATEST = "latest_checkpointed_iteration.txt"
_STEP = re.compile(r"global_step_(\d+)")


@dataclass(frozen=True)
class Source:
    """An adapter on disk.

    Attributes:
        adapter: its folder.
        training: what it was trained by, in words; None if the folders do not say.
        model: folder with the base model's ``config.json`` in the checkpoint; None if there is none.
    """

    adapter: Path
    training: str | None = None
    model: Path | None = None


def find(checkpoint: str, step: int | None = None) -> Source:
    """The adapter that `checkpoint` means; `step` chooses among a run's checkpoints.

    Raises ValueError if there is none.
    """
    path = Path(checkpoint).resolve()
    if not path.is_dir():
        raise ValueError(f"{checkpoint}: no such directory")
    if (path / _LATEST).is_file() or _steps(path):
        path = path / f"global_step_{_latest(path, checkpoint) if step is None else step}"
        if not path.is_dir():
            raise ValueError(f"{checkpoint}: has no {path.name}, only {_list(_steps(path.parent))}")
    elif step is not None:
        raise ValueError(f"--step {step}: is for the checkpoints of a verl run, and {checkpoint} holds none")
    for folder in (path, path / ADAPTER_FOLDER, path / "actor" / ADAPTER_FOLDER, path / "adapter"):
        if (folder / ADAPTER_FILES[0]).is_file():
            return _describe(folder)
    if RunFolder(str(path)).settings is not None:
        raise ValueError(f"{checkpoint}: this warm start has not finished; start it again to go on")
    raise ValueError(
        f"{checkpoint}: holds no adapter; give the checkpoints of a verl run (trainer.default_local_dir), one of its "
        f"global_step_N, the output of a warm start, or a folder with {ADAPTER_FILES[0]}"
    )


def _describe(adapter: Path) -> Source:
    around = adapter.parent
    step = _STEP.fullmatch(around.parent.name)
    if adapter.name == ADAPTER_FOLDER and step:
        model = around / "huggingface"
        known = (model / "config.json").is_file()
        return Source(adapter, f"verl, at step {int(step[1])}", model if known else None)
    settings = RunFolder(str(around)).settings if adapter.name == "adapter" else None
    if settings is not None:
        model = Path(settings["model"])
        return Source(adapter, f"warm start of {settings['steps']} steps", model if model.is_dir() else None)
    return Source(adapter)


def _steps(run: Path) -> list[int]:
    return sorted(int(m[1]) for folder in run.iterdir() if (m := _STEP.fullmatch(folder.name)))


def _latest(run: Path, named: str) -> int:
    """What the run says; a checkpoint it does not name may have been cut short."""
    file = run / _LATEST
    text = file.read_text().strip() if file.is_file() else ""
    if not text.isdigit():
        raise ValueError(f"{named}: has no {_LATEST} that names a step; say which with --step, of {_list(_steps(run))}")
    return int(text)


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
