"""Generated reasoning tasks that need what the window has lost.

All have one shape. The thought first works through the prompt's digits, one state a digit, and gives names to some of
the states: the *facts*. Then it *works* on for as many steps as the prompt asks, each step a countdown and a new state.
Then it answers, and for that it needs the facts again. No state can be had from the prompt in one step (each follows
from the one before), so a model that no longer sees a fact has lost it, unless something else remembers. ::

    prompt    BOS  query  work  digits, those of facts marked  (lookup and arithmetic: nothing, tracking: digits)  SEP
    thought   states, those of facts named | countdown state, countdown state, ... | ANS answer EOS

    lookup      one state machine, s <- table[digit][s]; the answer is the value of the queried fact
    tracking    the same machine; every fact is a register, which the answer takes one step on, by a digit of its own
    arithmetic  a running sum, s <- s + digit mod 10; the answer carries two queried facts over and adds them, mod 10

The distance between facts and their use is the amount of work, and with it the length of the answer. A right thought
is unique, so chains are compared with it token by token.

Left out: text. Token ids are the language, and there is no tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

DIGITS = 10
BOS, SEP, ANS, EOS = range(DIGITS, DIGITS + 4)
MAX_FACTS = 8
_MARK = EOS + 1  # of a fact's digit in the prompt
_NAME = _MARK + MAX_FACTS  # of a fact in thought, query and answer
_RESUME = _NAME + MAX_FACTS  # of a register's digit for the answer
_TOTAL = _RESUME + MAX_FACTS  # names the sum of two facts
_COUNT = _TOTAL + 1  # countdown: _COUNT + 0, 1, ...
KINDS = ("lookup", "tracking", "arithmetic")
WHOLE = 0.9  # of a thought; to miscount by a step leaves out no work worth the name


class Example(NamedTuple):
    """A prompt, the right thought, and where its answer begins."""

    prompt: list[int]
    thought: list[int]  # ends with EOS
    answer_start: int  # index in `thought` of what follows ANS


class Score(NamedTuple):
    """Of one response."""

    answer: float  # share of the answer's values that are right, 0 or 1 but for tracking; 0 if it came early
    chain: float  # share of the right thought's tokens before the answer found at their places
    early: bool  # it answered after less than WHOLE of the right thought's tokens


@dataclass(frozen=True)
class Task:
    """A family of examples.

    Attributes:
        kind: `lookup`, `tracking` or `arithmetic`.
        num_facts: facts a thought sets.
        lead: digits before the first fact.
        max_work: most work steps an example may ask for; sizes the vocabulary.
    """

    kind: str = "lookup"
    num_facts: int = 4
    lead: int = 4
    max_work: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"task={self.kind!r}: must be one of {', '.join(KINDS)}")
        if not 2 <= self.num_facts <= MAX_FACTS:
            raise ValueError(f"num_facts={self.num_facts}: must be 2 to {MAX_FACTS}")

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return _COUNT + self.max_work + 1

    @property
    def prompt_length(self) -> int:
        """Of every example."""
        resumed = 2 * self.num_facts if self.kind == "tracking" else 0
        return 4 + self.lead + 2 * self.num_facts + resumed + 1

    def thought_length(self, work: int) -> int:
        """Of an example with `work` work steps."""
        pairs = {"lookup": 1, "tracking": self.num_facts, "arithmetic": 3}[self.kind]
        return self.lead + 2 * self.num_facts + 2 * work + 1 + 2 * pairs + 1

    def examples(self, works: Sequence[int], generator: torch.Generator) -> list[Example]:
        """One for each number of work steps."""
        return [self._example(work, generator) for work in works]

    def score(self, example: Example, response: Sequence[int]) -> Score:
        """What a response is worth. Anything may be in it.

        An early answer is worth nothing: to leave out the work while the facts are still in sight would be the shortest
        way to a reward, and GRPO from scratch finds it.
        """
        found = list(response)
        right = example.thought[: example.answer_start]
        chain = sum(a == b for a, b in zip(right, found, strict=False)) / len(right)
        wanted = example.thought[example.answer_start : -1]
        start = found.index(ANS) + 1 if ANS in found else len(found)
        early = ANS in found and start < WHOLE * example.answer_start
        given = [] if early else found[start:]
        hits = [given[i : i + 2] == wanted[i : i + 2] for i in range(0, len(wanted), 2)]
        graded = hits[-1:] if self.kind == "arithmetic" else hits  # the sum, not what it was made from
        return Score(sum(graded) / len(graded), chain, early)

    def _example(self, work: int, generator: torch.Generator) -> Example:
        assert 0 <= work <= self.max_work
        facts = self.num_facts

        def draw(high: int, n: int) -> list[int]:
            return torch.randint(0, high, (n,), generator=generator).tolist()

        digits, query = draw(DIGITS, self.lead + facts), draw(facts, 2)
        prompt = [BOS, _NAME + query[0], _NAME + query[1], _COUNT + work]
        thought: list[int] = []
        values, state = [], 0
        for i, digit in enumerate(digits):
            fact = i - self.lead
            state = self._step(digit, state)
            if fact >= 0:
                prompt.append(_MARK + fact)
                thought.append(_NAME + fact)
                values.append(state)
            prompt.append(digit)
            thought.append(state)
        for count in range(work, 0, -1):
            state = self._step(count % DIGITS, state)
            thought += [_COUNT + count, state]
        thought.append(ANS)
        start = len(thought)
        if self.kind == "tracking":
            for fact, digit in enumerate(draw(DIGITS, facts)):
                prompt += [_RESUME + fact, digit]
                thought += [_NAME + fact, self._step(digit, values[fact])]
        elif self.kind == "lookup":
            thought += [_NAME + query[0], values[query[0]]]
        else:
            a, b = (values[q] for q in query)
            thought += [_NAME + query[0], a, _NAME + query[1], b, _TOTAL, (a + b) % DIGITS]
        return Example([*prompt, SEP], [*thought, EOS], start)

    def _step(self, digit: int, state: int) -> int:
        if self.kind == "arithmetic":
            return (state + digit) % DIGITS
        return _TABLE[digit][state]


def _table() -> list[list[int]]:
    """A permutation of the states for each digit; they generate no small group, so no shortcut leads through them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(DIGITS, generator=generator).tolist() for _ in range(DIGITS)]


_TABLE = _table()
