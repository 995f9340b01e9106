"""EvaluationFolder: what an evaluation keeps on disk, so that killing it at any moment loses only what was under way.

    settings.json    what the run is; another run is not mixed into it
    items.jsonl      one line an item, in the order they were done
    data/            data sets that were prepared for it
    summary.json     the numbers, and figures beside it, once all items are there

A line that was half written when the process died is cut off when the run goes on. One process writes at a time: the
file is locked, and the lock dies with the process.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from verl_pte.eval.items import Item, Record
from verl_pte.eval.settings import option
from verl_pte.run_claim import check_free, check_same, claim, replace_text, saved_settings

_DATA, _ITEMS, _KIND = "data", "items.jsonl", "evaluation"


class EvaluationFolder:
    """The folder of one evaluation; a context manager while it is written to.

    Attributes:
        done: items that are in the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.data, self.items = self.path / _DATA, self.path / _ITEMS
        self.summary = self.path / "summary.json"
        self.done: set[Item] = set()
        self._file: BinaryIO | None = None

    def check_free(self) -> None:
        """Raise ValueError if the folder holds something else than an evaluation."""
        check_free(self.path, _KIND, own=(_DATA, _ITEMS))

    def claim(self, settings: dict[str, Any]) -> None:
        """Make the folder this run's; for whoever has it open. Raises ValueError if it holds items of another one."""
        assert self._file is not None, "open it first: the lock says that nobody else is about to claim it"
        if self.done:  # else the settings are of a run that never began
            if saved_settings(self.path, _KIND) is None:
                raise ValueError(
                    f"--output {self.path}: holds items and does not say of which evaluation; give another"
                )
            check_same(self.path, _KIND, settings, option)
        claim(self.path, _KIND, settings)

    def __enter__(self) -> "EvaluationFolder":
        self.path.mkdir(parents=True, exist_ok=True)
        self._file = self.items.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"--output {self.path}: another process is evaluating into it") from None
        whole = self.items.read_bytes().rfind(b"\n") + 1
        self._file.truncate(whole)
        self.done = set()
        for number, record in enumerate(self.records(), 1):
            if record.item in self.done:
                self._file.close()
                raise ValueError(f"{self.items}, line {number}: {record.item} is there twice; remove one of them")
            self.done.add(record.item)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, records: Iterable[Record]) -> None:
        """Append items. Raises ValueError for one that is there."""
        assert self._file is not None
        lines = []
        for record in records:
            if record.item in self.done:
                raise ValueError(f"{record.item} is done")
            self.done.add(record.item)
            kept = {name: value for name, value in record._asdict().items() if name != "text" or value is not None}
            lines.append(json.dumps(kept) + "\n")
        self._file.write("".join(lines).encode())
        self._file.flush()

    def records(self) -> Iterator[Record]:
        """The items in the file, without their texts. Raises ValueError for a line that is none."""
        with self.items.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield Record(**json.loads(line) | {"text": None})
                except (json.JSONDecodeError, TypeError):
                    raise ValueError(f"{self.items}, line {number}: is no item; remove it") from None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace the numbers."""
        replace_text(self.summary, json.dumps(summary, indent=1) + "\n")
