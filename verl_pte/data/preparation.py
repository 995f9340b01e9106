"""From a source to a file: reads a set's rows, leaves copies out, counts, checks the count and writes.

Memory holds the problems that stay, whatever the number of their copies. Copies of a problem that disagree on its
answer take the problem out: which of them is right cannot be told here, and a wrong one would be trained on.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from verl_pte.data.problem import Problem, Unusable, check_columns, problem_of
from verl_pte.data.prompt import DEFAULT_FAMILY, FAMILIES, PromptFormat
from verl_pte.data.rows import verl_row, write_rows
from verl_pte.data.sets import MathSet, math_set
from verl_pte.data.source import Source, open_source

_CONFLICT = "copies with different answers"
_SHOWN = 100  # characters of a problem that an error shows


@dataclass(frozen=True)
class Prepared:
    """What became of a set. read = duplicates + sum(dropped.values()) + written.

    Attributes:
        duplicates: rows left out because their problem had been there before.
        dropped: rows, or for disagreeing copies problems, left out for another reason, by reason.
        expected: how many problems the set should have, in words.
    """

    name: str
    path: Path
    source: str
    read: int
    duplicates: int
    dropped: dict[str, int]
    written: int
    expected: str


def prepare(
    name: str,
    output: Path,
    *,
    source: str | None = None,
    prompt: PromptFormat = FAMILIES[DEFAULT_FAMILY],
    allow_any_count: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Prepared:
    """Write a set of `SETS` as a parquet file that verl reads.

    Args:
        output: the folder that gets ``<name>.parquet``, or a path that ends in ``.parquet``. A file that is there is
            replaced when the new one is complete.
        source: a file (.parquet, .jsonl, .json), a folder of such files, or a hub id; None is the set's hub id.
        allow_any_count: write also if the number of problems is not the set's.
        progress: called now and then with the number of rows read, and of all rows if that is known.

    Raises ValueError naming the set or option, what was found and what would be right, and RuntimeError if the hub
    fails or cannot be asked. Nothing is written then.
    """
    found = math_set(name)
    output = Path(output)
    path = output if output.suffix == ".parquet" else output / f"{name}.parquet"
    if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
        raise ValueError(f"--output {output}: must be a folder, or a file ending in .parquet")
    opened = open_source(source or found.hub_id, found.split)
    reading = _Reading(found)
    reading.take_all(opened, progress)
    problems = reading.problems()
    prepared = Prepared(
        name=name,
        path=path,
        source=opened.name,
        read=reading.read,
        duplicates=reading.duplicates,
        dropped=dict(reading.dropped),
        written=len(problems),
        expected=found.expected,
    )
    if not problems or not (allow_any_count or found.lowest <= len(problems) <= found.highest):
        raise ValueError(_refusal(prepared, reading.examples))
    write_rows([verl_row(problem, index, found, prompt) for index, problem in enumerate(problems)], path)
    return prepared


@dataclass
class _Reading:
    """Rows taken in so far."""

    of: MathSet
    read: int = 0
    duplicates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # the first row of each reason
    _kept: dict[str | int, Problem] = field(default_factory=dict)
    _disputed: set[str | int] = field(default_factory=set)

    def take_all(self, source: Source, progress: Callable[[int, int | None], None] | None) -> None:
        total = source.total if source.total is not None else self.of.raw_rows
        for row in source.rows:
            if self.read == 0:
                check_columns(row, source.name)
            self._take(row)
            if progress is not None and self.read % 256 == 0:
                progress(self.read, total)
        if progress is not None:
            progress(self.read, self.read)

    def problems(self) -> list[Problem]:
        """Those that stay, in the order of their first rows; once, after the last row."""
        undisputed = []
        for key, problem in self._kept.items():
            if key in self._disputed:
                self._drop(_CONFLICT, problem.text)
            else:
                undisputed.append(problem)
        return undisputed

    def _take(self, row: dict) -> None:
        self.read += 1
        try:
            problem = problem_of(row)
        except Unusable as reason:
            self._drop(str(reason), f"row {self.read - 1}, {str(row)}")
            return
        key = problem.text if self.of.repeated else self.read
        known = self._kept.setdefault(key, problem)
        if known is not problem:
            self.duplicates += 1
            if known.answer != problem.answer:
                self._disputed.add(key)

    def _drop(self, reason: str, example: str) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, example[:_SHOWN])


def _refusal(prepared: Prepared, examples: dict[str, str]) -> str:
    reasons = "".join(
        f"; {reason}: {count} (the first: {examples[reason]})" for reason, count in prepared.dropped.items()
    )
    counts = f"{prepared.read} rows read, {prepared.duplicates} duplicates{reasons}"
    if not prepared.written:
        return f"{prepared.name}: no problem in {prepared.source}; {counts}"
    return (
        f"{prepared.name}: {prepared.written} problems in {prepared.source}, expected {prepared.expected}; {counts}. "
        "--allow-any-count writes another variant or a part of the set"
    )
