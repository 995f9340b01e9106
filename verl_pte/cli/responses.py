"""How far an evaluation is, and the mean score so far."""

import time
from typing import TYPE_CHECKING

from rich.console import Console

from verl_pte.cli.progress import RunDisplay

if TYPE_CHECKING:
    from verl_pte.eval.items import Record

_LINES = 20


class ResponseDisplay(RunDisplay):
    """Shows responses as they are done, with the mean score of the window under way."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        super().__init__(console, "responses", total, done, lines=_LINES)
        self._scores: list[float] = []
        self._window: int | None = None
        self._tokens, self._started = 0, time.perf_counter()

    def show(self, records: "list[Record]") -> None:
        """Take a response in; of its budgets the longest counts."""
        longest = max(records, key=lambda record: record.max_tokens)
        if longest.window != self._window:
            self._window, self._scores = longest.window, []
        self._scores.append(longest.score)
        self._tokens += longest.tokens
        speed = self._tokens / (time.perf_counter() - self._started)
        window = "full" if longest.window is None else longest.window
        mean = sum(self._scores) / len(self._scores)
        self.advance(f"window {window}  score {mean:.3f}  {speed:.0f} tokens/s")
