"""The known data sets: where each is found, and how many problems it has to give.

A count is part of what a set is: a result on 83 problems of AMC is not one on the 40 others report on.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MathSet:
    """One data set.

    Attributes:
        name: also the rows' `data_source`, so verl's metrics of the set carry it.
        hub_id: what is read if no other source is given.
        split: `train` or `test`, as the rows' `extra_info` says; on the hub, which split is read if there are several.
        lowest, highest: how many problems there have to be.
        raw_rows: rows of the hub's set, copies included.
        repeated: files of this set hold each problem several times, so copies are left out. Elsewhere a row is a
            problem, as in published counts.
    """

    name: str
    hub_id: str
    split: str
    lowest: int
    highest: int
    raw_rows: int
    repeated: bool = False

    @property
    def expected(self) -> str:
        """The count in words."""
        return f"{self.lowest:,}" if self.lowest == self.highest else f"{self.lowest:,} to {self.highest:,}"


def _benchmark(name: str, hub_id: str, problems: int, repeated: bool = False) -> MathSet:
    return MathSet(name, hub_id, "test", problems, problems, problems, repeated)


# The sets of DAPO repeat each problem: 100 times for training, 32 times for AIME.
SETS: dict[str, MathSet] = {
    found.name: found
    for found in (
        # 1,791,700 rows. Reported: 17,398 different prompts, 17,391 without those whose copies disagree on the answer;
        # 17,917 is the rows by 100. docs/data.md has the sources. The lower bound leaves room for a few rows that are
        # dropped here and not there.
        MathSet("dapo-math-17k", "BytedTsinghua-SIA/DAPO-Math-17k", "train", 17_000, 17_917, 1_791_700, repeated=True),
        _benchmark("math-500", "HuggingFaceH4/MATH-500", 500),
        _benchmark("aime-2024", "HuggingFaceH4/aime_2024", 30, repeated=True),
        _benchmark("aime-2025", "math-ai/aime25", 30, repeated=True),
        _benchmark("amc-2023", "math-ai/amc23", 40),
        _benchmark("minerva-math", "math-ai/minervamath", 272),
        _benchmark("olympiadbench", "math-ai/olympiadbench", 674),
    )
}


def math_set(name: str) -> MathSet:
    """Raises ValueError, with the names there are, if it is unknown."""
    if name not in SETS:
        raise ValueError(f"{name}: no such data set; known are {', '.join(SETS)}")
    return SETS[name]
