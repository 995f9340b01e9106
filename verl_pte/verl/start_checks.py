"""Checks of what a run starts from: the checkpoint it goes on from, or a saved adapter; called by checks.py.

verl goes on from the last checkpoint in a run's folder under whatever settings it is given now. What shapes the
adapter, or what is computed with it, has to be what the checkpoint was trained with. Left out: optimizer and data,
which are verl's to load.
"""

import os
import warnings
from typing import Any

from peft import PeftModel

from verl_pte.peft.saved import ADAPTER_FOLDER, check_fits


def check_start(config: Any, attached: PeftModel) -> None:
    """Raise ValueError unless the run's model can go on from what it is told to.

    `attached` is that model, on any device. Warns where a checkpoint goes before the adapter that was named.
    """
    from verl.utils.fs import copy_to_local

    trainer, model = config.trainer, config.actor_rollout_ref.model
    named, checkpoint = model.get("lora_adapter_path", None), resumed(trainer)
    if named is not None:
        local = copy_to_local(named, use_shm=model.get("use_shm", False))
        _check(local, attached, "actor_rollout_ref.model.lora_adapter_path")
    if checkpoint is not None and os.path.isdir(os.path.join(checkpoint, "actor")):  # else on the workers' disks
        folder = os.path.join(checkpoint, "actor", ADAPTER_FOLDER)
        _check(folder, attached, f"trainer.resume_mode={trainer.resume_mode} goes on from a checkpoint")
    if named is not None and checkpoint is not None:
        warnings.warn(  # not a log record: importing vLLM sets the root logger to errors alone
            f"trainer.resume_mode={trainer.resume_mode}: this run goes on from {checkpoint}, not from "
            f"actor_rollout_ref.model.lora_adapter_path={named}. If that checkpoint is another run's, set another "
            "trainer.experiment_name or trainer.default_local_dir",
            stacklevel=2,
        )


def resumed(trainer: Any) -> str | None:
    """Folder of the checkpoint that verl's trainer will load, None if it starts anew."""
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    if trainer.resume_mode == "auto":
        return find_latest_ckpt_path(os.path.abspath(trainer.default_local_dir))
    if trainer.resume_mode != "resume_path":
        return None
    path = trainer.get("resume_from_path", None)
    if not isinstance(path, str) or "global_step_" not in path:
        raise ValueError(
            f"trainer.resume_from_path={path!r}: must be a checkpoint's folder .../global_step_N with "
            "trainer.resume_mode=resume_path"
        )
    return os.path.abspath(path)


def _check(adapter: str, attached: PeftModel, whence: str) -> None:
    try:
        check_fits(adapter, attached)
    except ValueError as error:
        raise ValueError(f"{whence}, under model.pte: {error}") from None
