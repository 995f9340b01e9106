"""What the benchmarks' commands share: options that show their defaults, a progress bar, errors, where results go."""

import contextlib
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def option(help: str, default: Any, *flags: str) -> Any:
    """An option whose default is known only later; the help shows it."""
    return typer.Option(*flags, help=f"{help} Default: {default}.", show_default=False)


def parse_lengths(text: str, example: str, name: str = "--lengths") -> tuple[int, ...]:
    """Numbers with commas between, of the option `name`. Raises ValueError."""
    try:
        return tuple(int(length) for length in text.split(","))
    except ValueError:
        raise ValueError(f"{name} {text}: must be numbers with commas between, e.g. {example}") from None


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """What users got wrong ends the command with status 2, what went wrong with 1; no traceback either way."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


def draw_if_possible(path: Path, draw: Callable[[Path], Any]) -> str:
    """Draw the plot if matplotlib is there, which the benchmarks do without; says what came of it.

    A `draw` that may find nothing to show returns the files it wrote.
    """
    if find_spec("matplotlib") is None:
        return "no plot, which needs matplotlib: pip install 'verl-pte[docs]'"
    return "nothing to plot yet" if draw(path) == [] else f"plot: {path}"


@contextlib.contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar; what it gives is told what begins, and how much was done since it was told last."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, done: bar.update(task, description=text, advance=done)


def print_json(content: dict[str, Any]) -> None:
    """One line, the last on standard output."""
    print(json.dumps(content), flush=True)
