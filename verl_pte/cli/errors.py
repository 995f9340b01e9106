"""How commands end: 0, 2 for what the user can correct, 1 for a wrong installation, 130 after Ctrl-C."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

INTERRUPTED = 130  # what shells give a command that Ctrl-C ended


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the user can correct into a line and an exit status."""
    try:
        yield
    except ValueError as error:
        fail(error, 2)


def fail(error: Exception, status: int) -> NoReturn:
    """End with a line on standard error."""
    Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
    raise typer.Exit(status) from None
