"""Runs a module that checks something in a process of its own, and takes what it found.

Such a module calls `report` with its checks, as often as it likes. One that dies, hangs or cannot be imported leaves
the checks it had reported, and one more that says how it ended.
"""

import json
import subprocess
import sys
from dataclasses import asdict

from verl_pte.doctor.check import Check, Part, State

_MARK = "verl-pte doctor: "  # before a line of a probe; other lines are its libraries'
_SECONDS = 300


def report(check: Check) -> None:
    """Hand a check to the parent."""
    print(_MARK + json.dumps(asdict(check)), flush=True)


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def probe(module: str, name: str, part: Part) -> list[Check]:
    """What ``python -m module`` reports; `name` and `part` are those of the check that says that it failed."""
    advice = f"python -m {module} shows all of it"
    try:
        done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=_SECONDS)
        output, failed = done.stdout, done.returncode != 0
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as error:
        output, failed = (error.stdout or b"").decode(errors="replace"), True
        last = f"not done after {_SECONDS} seconds"
    checks = [_read(line) for line in output.splitlines() if line.startswith(_MARK)]
    if failed:
        checks.append(Check(name, part, State.problem, last[:300], advice))
    return checks


def _read(line: str) -> Check:
    fields = json.loads(line.removeprefix(_MARK))
    return Check(**fields | {"part": Part(fields["part"]), "state": State(fields["state"])})
