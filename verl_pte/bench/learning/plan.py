"""Which cells a report has: the quick one, and the full one in the order in which its parts say most.

Left out: how a cell is run (cells.py).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from verl_pte.bench.learning.base import BaseSettings
from verl_pte.bench.learning.cells import Cell
from verl_pte.bench.learning.methods import METHODS, QUICK_METHODS
from verl_pte.bench.learning.tasks import KINDS

FULL_BASE = BaseSettings(longest=64, steps=5000)
FAR = (24, 32, 40, 48, 56, 64)  # work steps of two tokens each
WITHIN = (4, 8, 12, 16, 20)  # up to the longest that are trained
FURTHER = (10, 48)  # work steps; those of other cells are 10 to 20
NARROW = {"window": 8, "block_size": 2}  # under which FAR is up to 18 windows
TRAINED = tuple(m for m in METHODS if m != "base")
TESTED_FAR = ("base", "pte", "lora_c", "lora_full", "global_only")
WARMED = ("pte", "lora_c", "global_only", "global_0")
AFTER_WARM: dict[str, Any] = {"way": "grpo", "warm": 400, "steps": 150, "lr": 1e-3, "kl": 0.3}
# With a third of this rate nothing moved in 150 steps; see `_ways_from_scratch` for what else is tried.
FROM_SCRATCH: dict[str, Any] = {"way": "grpo", "steps": 200, "lr": 3e-3, "cosine": False, "kl": 0.1}
WINDOWS = (32, 48)
# Beside the methods' own: 16 and 0.3; and a quarter, which is theirs in blocks of four tokens, where these are of one.
FRACTIONS = (0.0625, 0.125, 0.25, 0.5)
RANKS = (4, 8, 32)
STRENGTHS = (0.1, 1.0)
SAME_SIZE = 20  # the rank at which LoRA_c has as many trained parameters as PTE


def quick() -> list[Cell]:
    """One task, one seed, three methods."""
    return [Cell("lookup", method, "supervised", steps=350, tests=128) for method in QUICK_METHODS]


def full(seeds: int) -> list[Cell]:
    """Everything, one part after the other, all seeds of a part together. Other ways to train have one seed."""
    every, first = range(seeds), range(1)
    order = (
        (_distilled, every),
        (_after_warm, every),
        (_kl_alone, every),
        (_supervised, every),
        (_parts_supervised, every),
        (_sweeps, first),
        (_distilled_longer, every),
        (_distilled_further, every),
        (_in_verl, first),
        (_reward_alone, every),
        (_from_scratch, every),
        (_sweeps, every),
        (_ways_after_warm, first),
        (_ways_from_scratch, first),
    )
    cells = (cell for part, chosen in order for seed in chosen for cell in part(seed))
    return list({cell.name: cell for cell in cells}.values())  # the sweeps' first seed comes twice


def _supervised(seed: int) -> Iterator[Cell]:
    """The methods that are tested far beyond the lengths they were trained on."""
    for task in KINDS:
        for method in TESTED_FAR:
            if seed == 0 or method in TRAINED:  # a seed is nothing to what is not trained
                yield Cell(task, method, "supervised", seed, far=FAR, base=FULL_BASE)


def _parts_supervised(seed: int) -> Iterator[Cell]:
    """The others: PTE with other parts."""
    for task in KINDS:
        for method in METHODS:
            if method not in TESTED_FAR:
                yield Cell(task, method, "supervised", seed, base=FULL_BASE)


def _distilled(seed: int) -> Iterator[Cell]:
    for task in KINDS:
        for method in WARMED:
            yield Cell(task, method, "distilled", seed, far=FAR if method in TESTED_FAR else (), base=FULL_BASE)


def _distilled_longer(seed: int) -> Iterator[Cell]:
    """Twice as long: after 400 steps PTE's answers on the kept base of lookup still rise. There at every distance."""
    for task in KINDS:
        for method in ("pte", "lora_c") if seed == 0 else ("pte",):
            far = WITHIN + FAR if task == "lookup" else ()
            yield Cell(task, method, "distilled", seed, steps=800, far=far, base=FULL_BASE)


def _distilled_further(seed: int) -> Iterator[Cell]:
    """On lookup, as long again, with thoughts up to seven windows long: whether distance or practice is the limit."""
    for method in ("pte", "lora_c") if seed == 0 else ("pte",):
        cell = Cell("lookup", method, "distilled", seed, steps=800, works=FURTHER, base=FULL_BASE)
        yield replace(cell, far=FAR)


def _after_warm(seed: int) -> Iterator[Cell]:
    for task in KINDS:
        for method in WARMED:
            yield Cell(task, method, seed=seed, base=FULL_BASE, **AFTER_WARM)


def _kl_alone(seed: int) -> Iterator[Cell]:
    """What the KL to the full-cache base does without any reward: it distils too, on the model's own samples."""
    for task in KINDS:
        yield Cell(task, "pte", seed=seed, base=FULL_BASE, **AFTER_WARM, rewarded=False)


def _reward_alone(seed: int) -> Iterator[Cell]:
    """On two tasks: no KL to anything. The base under its full cache is then nowhere but in the warm start."""
    for task in ("lookup", "tracking"):
        for method in ("pte", "lora_c"):
            yield replace(Cell(task, method, seed=seed, base=FULL_BASE, **AFTER_WARM), kl=0.0, lr=5e-4)


def _from_scratch(seed: int) -> Iterator[Cell]:
    for task in KINDS:
        for method in TRAINED:
            yield Cell(task, method, seed=seed, base=FULL_BASE, **FROM_SCRATCH)


def _in_verl(seed: int) -> Iterator[Cell]:
    """On lookup: every method through `main_ppo`, and PTE for as long as outside of it."""
    in_verl = AFTER_WARM | {"way": "main_ppo"}
    for method in TRAINED:
        yield Cell("lookup", method, seed=seed, base=FULL_BASE, **in_verl | {"steps": 40})
    yield Cell("lookup", "pte", seed=seed, base=FULL_BASE, **in_verl)


def _ways_after_warm(seed: int) -> Iterator[Cell]:
    """On lookup: a weaker KL, and a start that leaves more to learn."""
    pte = Cell("lookup", "pte", seed=seed, base=FULL_BASE, **AFTER_WARM)
    yield replace(pte, kl=0.1)
    yield Cell("lookup", "pte", "distilled", seed, steps=250, base=FULL_BASE)
    yield replace(pte, warm=250)


def _ways_from_scratch(seed: int) -> Iterator[Cell]:
    """On lookup: what may make reward alone work."""
    pte = Cell("lookup", "pte", seed=seed, base=FULL_BASE, **FROM_SCRATCH)
    yield replace(pte, cosine=True)
    yield replace(pte, kl=0.0)
    yield replace(pte, kl=0.3)
    yield replace(pte, lr=1e-3)
    yield replace(pte, lr=1e-3, encoder_lr=5.0)
    yield replace(pte, full_reference=False)


def _sweeps(seed: int) -> Iterator[Cell]:
    """On lookup, supervised: one setting at a time."""
    pte = Cell("lookup", "pte", "supervised", seed, base=FULL_BASE)
    for method in ("pte", "lora_c"):
        yield replace(pte, method=method, knobs=NARROW, far=FAR)
        for window in WINDOWS:
            yield replace(pte, method=method, knobs={"window": window})
    for fraction in FRACTIONS:
        yield replace(pte, knobs={"evict_fraction": fraction, "block_size": 1})
    for rank in RANKS:
        yield replace(pte, knobs={"rank": rank, "alpha": 2.0 * rank})
    yield replace(pte, method="lora_c", knobs={"rank": SAME_SIZE, "alpha": 2.0 * SAME_SIZE})
    for strength in STRENGTHS:
        yield replace(pte, knobs={"update_strength": strength})
