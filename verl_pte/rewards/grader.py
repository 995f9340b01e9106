"""Grades answers in processes of its own, so that an item's time limit holds whatever the item does.

Mathematics in strings from a model is hostile input: ``9^{9^{9^9}}`` keeps an interpreter busy inside one instruction,
where neither a signal nor another thread reaches it. A process can be killed. Each has one item at a time; one that is
late is killed, and another takes its place. Threads may grade at once, each waiting for a free process.

The parent talks to a process by lines of JSON (grader_process.py). Left out: what is equal to what, which is
math-verify's; and where an answer stands in a response (answer.py).
"""

import atexit
import json
import os
import queue
import select
import subprocess
import sys
import threading
from collections import Counter
from typing import Any, NamedTuple

VERDICTS = ("right", "wrong", "unparsed", "late")


class Grade(NamedTuple):
    """Of one answer."""

    score: float  # 1.0 if right
    verdict: str  # one of VERDICTS


class Grader:
    """Grades with up to `processes` at once, each item within `seconds`.

    Attributes:
        counts: of verdicts so far.
    """

    def __init__(self, processes: int = 2, seconds: float = 5.0) -> None:
        if processes < 1 or not seconds > 0:
            raise ValueError(f"processes={processes}, seconds={seconds}: must be at least 1, and positive")
        self.processes, self.seconds = processes, seconds
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._begin()
        atexit.register(self.close)

    def grade(self, answer: str | None, truth: str) -> Grade:
        """Whether `answer` says what `truth` says. Never raises for what is in them."""
        verdict = self._verdict(answer, truth)
        with self._lock:
            self.counts[verdict] += 1
        return Grade(float(verdict == "right"), verdict)

    def close(self) -> None:
        """End the processes; the next item begins new ones."""
        if self._owner != os.getpid():  # a fork: they are the parent's
            return
        for process in list(self._all):
            self._drop(process)
        self._begin()

    def _begin(self) -> None:
        self._owner = os.getpid()
        self._all: list[subprocess.Popen] = []
        self._free: queue.Queue[subprocess.Popen | None] = queue.Queue()
        for _ in range(self.processes):
            self._free.put(None)  # a place, whose process starts when it is needed

    def _verdict(self, answer: str | None, truth: str) -> str:
        if answer is None:
            return "unparsed"
        if answer == truth:
            return "right"
        if self._owner != os.getpid():
            self._begin()
        free = self._free
        process = free.get()
        try:
            if process is None or process.poll() is not None:
                process = self._start()
            reply = _ask(process, {"answer": answer, "truth": truth}, self.seconds)
            if reply is None:
                self._drop(process)
                process = None
                return "late"
            return reply
        finally:
            free.put(process)

    def _start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "verl_pte.rewards.grader_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        with self._lock:
            self._all.append(process)
        if _read(process, 60.0) != "ready":
            self._drop(process)
            raise RuntimeError(
                "the grading process did not start: python -m verl_pte.rewards.grader_process says why; it needs "
                "math-verify (pip install 'verl-pte[eval]')"
            )
        return process

    def _drop(self, process: subprocess.Popen) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        with self._lock:
            self._all.remove(process)


def _ask(process: subprocess.Popen, item: dict[str, Any], seconds: float) -> str | None:
    """The verdict, or None if there is none in time or the process died of the item."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(item).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    return _read(process, seconds)


def _read(process: subprocess.Popen, seconds: float) -> str | None:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], seconds)
    if not readable:
        return None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith(b"\n") else None
