"""A process that grades: one JSON line in, ``{"answer": ..., "truth": ...}``, one out, a verdict.

The parent (grader.py) keeps the time. An address-space limit keeps the memory: an answer that asks for more dies.
"""

import json
import os
import resource
import sys

_MEMORY = 2 << 30  # bytes


def verdict(answer: str, truth: str) -> str:
    """`right`, `wrong`, or `unparsed` where one of the two is no mathematics."""
    from math_verify import parse, verify

    # Time limits are the parent's: those of math-verify are signals, which one long instruction outlasts.
    told, wanted = (parse(rf"\boxed{{{_clean(text)}}}", parsing_timeout=None) for text in (answer, truth))
    if not wanted:
        return "right" if _plain(answer) == _plain(truth) else "unparsed"
    if not told:
        return "unparsed"
    return "right" if verify(wanted, told, timeout_seconds=None) else "wrong"


def _clean(text: str) -> str:
    """Without what math-verify trips over: a full stop at the end, dollar signs around, a per cent sign (a unit)."""
    return text.strip().strip("$").rstrip(". ").removesuffix("%").removesuffix("\\")


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def main() -> None:
    """Serve until the parent closes the pipe."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    verdict("1/2", "0.5")  # loads what is slow to load
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print(json.dumps("ready"), file=channel, flush=True)
    for line in sys.stdin:
        item = json.loads(line)
        try:
            found = verdict(item["answer"], item["truth"])
        except (Exception, RecursionError):
            found = "unparsed"
        print(json.dumps(found), file=channel, flush=True)


if __name__ == "__main__":
    main()
