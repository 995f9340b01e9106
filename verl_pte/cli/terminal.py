"""How ``verl-pte generate`` speaks with its user: once through pipes, or turn by turn in a terminal.

A Ctrl-C during an answer sets a flag that is looked at between two steps, because an engine that is interrupted in the
middle of one cannot go on. The second Ctrl-C is a KeyboardInterrupt as ever.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from rich.console import Console
from rich.text import Text

from verl_pte.cli.chat import Chat
from verl_pte.cli.display import AnswerDisplay

_END = ("exit", "quit", "/exit", "/quit")


def answer_once(chat: Chat, prompt: str) -> bool:
    """Write the answer to standard output as it comes, and its numbers to standard error; False if interrupted."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    with _interrupts() as stop, contextlib.closing(chat.answer(prompt)) as pieces:
        for text in pieces:
            sys.stdout.write(text)
            sys.stdout.flush()
            if stop.is_set():
                break
    sys.stdout.write("\n")
    sys.stdout.flush()
    print(chat.facts.line(), file=sys.stderr)
    return not stop.is_set()


def converse(chat: Chat) -> None:
    """Read, answer, until the user ends it."""
    console = Console(highlight=False)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits lines with it
    console.print("[dim]Ctrl-C stops an answer, /clear forgets the conversation, exit or Ctrl-D ends it.[/]")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n[dim]exit or Ctrl-D ends the conversation[/]")
            continue
        if text in _END:
            return
        if text == "/clear":
            chat.messages = []
            console.print("[dim]forgotten[/]")
        elif text:
            _show(chat, text, console)


def _show(chat: Chat, text: str, console: Console) -> None:
    answer = contextlib.closing(chat.answer(text))
    try:
        with _interrupts() as stop, answer as pieces, AnswerDisplay(console, chat.facts) as display:
            for piece in pieces:
                display.add(piece)
                if stop.is_set():
                    break
    except ValueError as error:
        console.print(Text.assemble(("Error: ", "bold red"), str(error)))


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C raises KeyboardInterrupt."""
    stop = threading.Event()

    def note(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
