"""Parts of an evaluation with everything filled in: settings, questions, records, an open folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl_pte.eval.folder import EvaluationFolder
from verl_pte.eval.items import Record
from verl_pte.eval.questions import Question
from verl_pte.eval.settings import EvaluateSettings


def settings(**changed) -> EvaluateSettings:
    given = dict(model="m", adapter=None, baseline=None, engine="native", window=(16,), max_tokens=(8,))
    return EvaluateSettings(**(given | changed))


def question(row: int = 0, truth: str = "7", data: str = "set", prompt: tuple = (1, 2, 3)) -> Question:
    return Question(data, row, list(prompt), truth, "source", {"index": row})


def record(row: int = 0, sample: int = 0, score: float = 0.0, **changed) -> Record:
    facts = dict(
        data="set",
        window=16,
        max_tokens=8,
        tokens=5,
        finish_reason="stop",
        num_evictions=0,
        peak_cache_tokens=9,
        answer=None,
        unparsed=False,
        text="\u2028 a\nb",
    )
    return Record(row=row, sample=sample, score=score, **(facts | changed))


@contextmanager
def open_folder(path: Path, **settings) -> Iterator[EvaluationFolder]:
    with EvaluationFolder(str(path)) as folder:
        folder.claim({"n": 1} | settings)
        yield folder
