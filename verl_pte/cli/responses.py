"""How far an evaluation is: a bar on a terminal, elsewhere a line every twentieth."""

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from verl_pte.eval.items import Record

_LINES = 20


class ResponseDisplay(AbstractContextManager):
    """Shows responses as they are done, with the mean score of the window under way."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.done = console, total, done
        self._scores: list[float] = []
        self._window: int | None = None
        self._tokens, self._started = 0, time.perf_counter()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),  # all of it fits 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task: TaskID = self.bar.add_task("responses", total=total, completed=done, facts="")

    def __enter__(self) -> "ResponseDisplay":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def show(self, records: "list[Record]") -> None:
        """Take a response in; of its budgets the longest counts."""
        longest = max(records, key=lambda record: record.max_tokens)
        if longest.window != self._window:
            self._window, self._scores = longest.window, []
        self._scores.append(longest.score)
        self._tokens += longest.tokens
        before, self.done = self.done, self.done + 1
        speed = self._tokens / (time.perf_counter() - self._started)
        window = "full" if longest.window is None else longest.window
        mean = sum(self._scores) / len(self._scores)
        facts = f"window {window}  score {mean:.3f}  {speed:.0f} tokens/s"
        if self.console.is_terminal:
            self.bar.update(self.task, completed=self.done, facts=facts)
        elif self.done * _LINES // self.total > before * _LINES // self.total:
            self.console.print(f"responses {self.done}/{self.total}  {facts}", soft_wrap=True)
