"""RunFolder: what a warm start keeps on disk, so that killing it at any moment loses no more than the steps since its
last checkpoint.

    settings.json    what the run is; another run is not mixed into it
    log.jsonl        one line a step
    checkpoint.pt    adapter, optimizer state and number of steps done; removed when the run has finished
    adapter/         the result, as PEFT saves it: it is there if and only if the run has finished

Everything but the log is written under another name and renamed. The log is cut back to the checkpoint's step when a
run goes on.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from verl_pte.distill.settings import option
from verl_pte.run_claim import check_free, check_same, claim, replace_text, saved_settings, unfinished_name

_KIND = "warm start"


class RunFolder:
    """The folder of one run. Only one process writes to it."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.adapter, self.log = self.path / "adapter", self.path / "log.jsonl"
        self._checkpoint = self.path / "checkpoint.pt"

    def check(self, settings: dict[str, Any]) -> None:
        """Raise ValueError if the folder holds another run, or something else."""
        check_free(self.path, _KIND)
        check_same(self.path, _KIND, settings, option)

    def claim(self, settings: dict[str, Any]) -> None:
        """Make the folder this run's."""
        claim(self.path, _KIND, settings)

    @property
    def settings(self) -> dict[str, Any] | None:
        """What the run is, by option; None if the folder holds no warm start."""
        return saved_settings(self.path, _KIND)

    @property
    def finished(self) -> bool:
        """Whether the result is there."""
        return self.adapter.is_dir()

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The last checkpoint, or None."""
        if not self._checkpoint.is_file():
            return None
        return torch.load(self._checkpoint, map_location=device, weights_only=True)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        unfinished = unfinished_name(self._checkpoint)
        torch.save(state, unfinished)
        os.replace(unfinished, self._checkpoint)

    def finish(self, model: PeftModel) -> None:
        """Write the result, and drop the checkpoint."""
        unfinished = unfinished_name(self.adapter)
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(str(unfinished), save_embedding_layers=False)
        os.rename(unfinished, self.adapter)
        self._checkpoint.unlink(missing_ok=True)

    def records(self) -> Iterator[dict[str, Any]]:
        """Lines of the log that are whole."""
        if self.log.is_file():
            for line in self.log.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    return  # the process was killed while it wrote

    def cut_log(self, steps: int) -> None:
        """Drop what was logged after so many steps."""
        kept = [record for record in self.records() if record["step"] <= steps]
        replace_text(self.log, "".join(json.dumps(record) + "\n" for record in kept))

    def add(self, record: dict[str, Any]) -> None:
        """Append a line to the log."""
        with self.log.open("a") as log:
            log.write(json.dumps(record) + "\n")
