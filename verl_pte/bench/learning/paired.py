"""What two trainings differ by, seed by seed: both saw the same examples, so their difference varies less than they do.

Pairs are PTE and every other method trained alike, its update's variants, GRPO with and without reward, and the end
of a GRPO run and its start. Left out: pairs of two bases, and what one pair alone has, which has no interval.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from verl_pte.bench.learning.methods import METHODS
from verl_pte.bench.learning.report import end_reward, interval, rewards, setting, show, title, way

_PAIRS = (
    *(("pte", method) for method in METHODS if method not in ("pte", "base")),
    ("pte_frobenius", "pte_literal"),
    ("pte_literal", "lora_c"),
)

Cells = dict[int, dict[str, Any]]  # of one row, by seed


class Difference(NamedTuple):
    """Of `what` in cells of `task` and `training`; `answer` and `reward` as `report.interval` gives them."""

    task: str
    training: str
    what: str
    seeds: list[int]
    answer: dict[str, float | None]
    reward: dict[str, float | None] | None


def differences(found: Sequence[dict[str, Any]]) -> list[Difference]:
    """All there are with two seeds or more."""
    rows: dict[str, tuple[dict[str, Any], Cells]] = {}
    for cell in found:
        if "failure" not in cell:
            row = setting(cell)
            rows.setdefault(str(row), (row, {}))[1][cell["cell"]["seed"]] = cell
    return [difference for row, cells in rows.values() for difference in _of_row(row, cells, rows)]


def _of_row(row: dict[str, Any], cells: Cells, rows: dict[str, tuple[dict[str, Any], Cells]]) -> Iterator[Difference]:
    for first, second in _PAIRS:
        other = rows.get(str(row | {"method": second}))
        if row["method"] == first and other is not None:
            yield from _paired(row, f"{title(row)} - {title(other[0])}", cells, other[1], _answer)
    unrewarded = rows.get(str(row | {"rewarded": False}))
    if row["rewarded"] and unrewarded is not None:
        yield from _paired(row, f"{title(row)}, with reward - without", cells, unrewarded[1], _answer)
    if row["warm"]:
        yield from _paired(row, f"{title(row)}, after - before", cells, cells, _answer_before, with_rewards=False)


def _paired(
    row: dict[str, Any],
    what: str,
    first: Cells,
    second: Cells,
    subtracted: Callable[[dict[str, Any]], float],
    with_rewards: bool = True,
) -> Iterator[Difference]:
    shared = first.keys() & second.keys()
    seeds = sorted(seed for seed in shared if first[seed]["base_digest"] == second[seed]["base_digest"])
    if len(seeds) < 2:
        return
    answer = interval([_answer(first[s]) - subtracted(second[s]) for s in seeds])
    pairs = [(rewards(first[s]), rewards(second[s])) for s in seeds]
    paid = with_rewards and all(a and b for a, b in pairs)
    reward = interval([end_reward(a) - end_reward(b) for a, b in pairs]) if paid else None
    yield Difference(row["task"], way(row), what, seeds, answer, reward)


def _answer(cell: dict[str, Any]) -> float:
    return cell["history"][-1]["answer"]


def _answer_before(cell: dict[str, Any]) -> float:
    return cell["history"][0]["answer"]


def markdown(found: Sequence[Difference]) -> str:
    """A table for a document."""
    lines = ["| task | training | difference | seeds | answer | reward |", "|---" * 6 + "|"]
    for d in found:
        lines.append(f"| {d.task} | {d.training} | {d.what} | {len(d.seeds)} | {show(d.answer)} | {show(d.reward)} |")
    return "\n".join(lines) + "\n"
