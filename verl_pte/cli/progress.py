"""How far a long run is: a bar on a terminal, lines elsewhere. What is counted and said is the command's."""

from contextlib import AbstractContextManager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class RunDisplay(AbstractContextManager):
    """Shown while it is entered.

    Args:
        noun: what is counted.
        total, done: of it, and how many an earlier run did.
        lines: most lines where there is no terminal; None prints one each time.
    """

    def __init__(self, console: Console, noun: str, total: int, done: int, lines: int | None = None) -> None:
        self.console, self.noun, self.total, self.done, self._lines = console, noun, total, done, lines
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),  # all of it fits 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task(noun, total=total, completed=done, facts="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def advance(self, facts: str) -> None:
        """One more is done; `facts` go beside the count."""
        before, self.done = self.done, self.done + 1
        if self.console.is_terminal:
            self._bar.update(self._task, completed=self.done, facts=facts)
        elif self._lines is None or self.done * self._lines // self.total > before * self._lines // self.total:
            self.console.print(f"{self.noun} {self.done}/{self.total}  {facts}", soft_wrap=True)
