"""An answer on a terminal while it is generated: its text, and under it a line about the cache.

Finished lines are printed and scroll away; the line under way and the bar are redrawn in place. Control characters of
the model's are not passed on to the terminal.
"""

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from verl_pte.cli.chat import Facts

_BAR_WIDTH = 16


class AnswerDisplay:
    """Shows one answer; a context manager. `facts` is read at each redraw."""

    def __init__(self, console: Console, facts: Facts) -> None:
        self.console, self.facts = console, facts
        self._line = ""
        self._live = Live(self, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> "AnswerDisplay":
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()
        if self._line:
            self.console.print(Text(self._line))
        if self.facts.tokens:
            self.console.print(Text(self.facts.line(), style="dim"))

    def __rich__(self) -> RenderableType:
        return Group(Text(self._line), status(self.facts))

    def add(self, text: str) -> None:
        """Append text."""
        *lines, self._line = (self._line + _printable(text)).split("\n")
        while cell_len(self._line) > self.console.width:
            head, self._line = _break(self._line, self.console.width)
            lines.append(head)
        for line in lines:
            self.console.print(Text(line))


def status(facts: Facts) -> RenderableType:
    """``cache [bar] 52/64 tokens  5 evictions  120 generated  45.2/s``, which fits 80 columns."""
    numbers = f"{facts.num_evictions} evictions  {facts.tokens} generated  {facts.tokens_per_second:.1f}/s"
    row = Table.grid(padding=(0, 1))
    if not facts.tokens:
        row.add_row(Text(f"reading {facts.prompt_tokens} tokens", style="dim"))
    elif facts.cache_limit is None:
        row.add_row(Text(f"cache {facts.held_tokens} tokens, no limit  {numbers}"))
    else:
        bar = ProgressBar(total=facts.cache_limit, completed=facts.held_tokens, width=_BAR_WIDTH)
        row.add_row("cache", bar, Text(f"{facts.held_tokens}/{facts.cache_limit} tokens  {numbers}"))
    return row


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "\ufffd" for c in text)


def _break(line: str, width: int) -> tuple[str, str]:
    """Split a line that is too wide, behind the last space that fits if there is one. rich wraps wide letters."""
    end = line.rfind(" ", 0, width) + 1 or width
    return line[:end], line[end:]
