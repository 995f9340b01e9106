"""Runs cells in parallel processes, one thread each, and shows how far they are.

Bases come first, since all cells of a task share one. Interrupted, it goes on with what is missing the next time. Its
workers end with it, however it ends; what verl started for a cell that runs in verl may go on.
"""

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from verl_pte.bench.learning.base import TrainingFailure, trained_base
from verl_pte.bench.learning.cells import Cell, on_file, run
from verl_pte.bench.learning.tasks import Task

_messages: Any = None  # in a worker: where it says what it does


def run_all(
    cells: Sequence[Cell], folder: Path, jobs: int, console: Console, minutes: float | None = None
) -> list[dict[str, Any]]:
    """What the cells found, in their order, without those that `minutes` left no time for.

    Of errors that are no findings the console is told, and the rest goes on; RuntimeError if a process dies.
    """
    done = [cell for cell in cells if on_file(cell, folder) is not None]
    context = multiprocessing.get_context("spawn")
    end = None if minutes is None else time.monotonic() + 60 * minutes
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, before they start
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    messages = context.Queue()
    with (
        Progress(*columns, console=console) as bar,
        ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(messages,)) as pool,
    ):
        overall = bar.add_task("cells", total=len(cells), completed=len(done))
        lines: dict[int, Any] = {}

        def show(block: float) -> None:
            try:
                while True:
                    process, text, steps = messages.get(timeout=block)
                    if process not in lines:
                        lines[process] = bar.add_task("", total=None)
                    bar.update(lines[process], description=text[-100:], advance=steps)
                    block = 0.01
            except queue.Empty:
                pass

        def drain(work: list[tuple[Callable[..., Any], tuple]], on_done: Callable[[str | None], None]) -> None:
            todo, running = list(work), set[Future[Any]]()
            while todo or running:
                late = end is not None and time.monotonic() > end
                while todo and len(running) < jobs and not late:
                    function, arguments = todo.pop(0)
                    running.add(pool.submit(function, *arguments))
                if late and not running:
                    break
                finished, running = wait(running, timeout=0, return_when=FIRST_COMPLETED)
                for future in finished:
                    on_done(future.result())
                show(0.2)

        def end_base(error: str | None) -> None:
            if error is not None:
                console.print(f"failed: {error}", soft_wrap=True, markup=False)

        def end_cell(error: str | None) -> None:
            if error is None:
                bar.advance(overall)
            else:
                console.print(f"failed, and left for another run: {error}", soft_wrap=True, markup=False)

        missing = [cell for cell in cells if cell not in done]
        bases = {(cell.task, cell.base): cell for cell in missing}
        drain([(_base, (cell, folder)) for cell in bases.values()], end_base)
        drain([(_cell, (cell, folder)) for cell in missing], end_cell)
    return [known for cell in cells if (known := on_file(cell, folder)) is not None]


def _start(messages: Any) -> None:
    global _messages
    _messages = messages
    messages.cancel_join_thread()  # a worker ends though nobody reads what it said last
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from transformers.utils import logging

    logging.disable_progress_bar()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tell(text: str, steps: int) -> None:
    _messages.put((os.getpid(), text, steps))


def _base(cell: Cell, folder: Path) -> str | None:
    """What went wrong, if anything did. That a base does not learn is a finding of each cell that asks for it."""
    import torch

    torch.set_num_threads(1)
    try:
        trained_base(Task(cell.task), cell.base, folder / "bases", _tell)
    except TrainingFailure:
        return None
    except Exception as error:
        return f"base for {cell.task}: {type(error).__name__}: {error}"
    return None


def _cell(cell: Cell, folder: Path) -> str | None:
    """What went wrong, if anything did."""
    try:
        run(cell, folder, _tell)
    except Exception as error:  # the machine's fault, not a finding: other cells go on
        return f"{cell.name}: {type(error).__name__}: {error}"
    return None
