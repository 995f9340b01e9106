"""Evaluation: generates what is missing, grades beside it, and writes each item once.

Window by window, so that an engine holds one cache. The engine is kept busy: responses are asked for as rows become
free, and graded in threads while others are generated. Of the budgets of a response only the longest is generated, the
others are cut from it (items.py). A response whose items were not all written before a kill is generated again, to the
same tokens, and only what is missing is graded.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from verl_pte.core.schedule import Schedule
from verl_pte.engine import RolloutOutput, SamplingParams
from verl_pte.eval.folder import EvaluationFolder
from verl_pte.eval.items import Item, Record, cut, item_seed
from verl_pte.eval.questions import Question
from verl_pte.eval.scoring import PROCESSES, Scorer
from verl_pte.eval.settings import EvaluateSettings


class Engine(Protocol):
    """What an evaluation needs of an engine; `RolloutEngine` has it."""

    schedule: Schedule
    max_num_seqs: int

    @property
    def has_unfinished(self) -> bool: ...

    def add_request(self, request_id: Any, prompt: Sequence[int], sampling: SamplingParams) -> None: ...

    def step(self) -> list[RolloutOutput]: ...


class Response(NamedTuple):
    """One to generate: of a question, under a window, for the budgets that are missing."""

    question: Question
    sample: int
    window: int | None
    missing: list[Item]


class Evaluation:
    """One evaluation, or the rest of one.

    Args:
        folder: open for writing; what it holds is not done again.
        make_engine: an engine for a window and a number of responses; it is gone, with its memory, before the next.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        questions: Sequence[Question],
        tokenizer: Any,
        scorer: Scorer,
        folder: EvaluationFolder,
        make_engine: Callable[[int | None, int], AbstractContextManager[Engine]],
    ) -> None:
        self.settings, self.questions, self.tokenizer = settings, questions, tokenizer
        self.scorer, self.folder, self.make_engine = scorer, folder, make_engine

    @property
    def num_responses(self) -> int:
        """Responses of the whole evaluation."""
        return len(self.settings.window) * len(self.questions) * self.settings.n

    def missing(self, window: int | None) -> list[Response]:
        """What is not done under a window, the samples of a row beside each other."""
        responses = []
        for question in self.questions:
            for sample in range(self.settings.n):
                items = [Item(question.data, question.row, sample, window, m) for m in self.settings.max_tokens]
                missing = [item for item in items if item not in self.folder.done]
                if missing:
                    responses.append(Response(question, sample, window, missing))
        return responses

    def run(self, on_response: Callable[[list[Record]], None] = lambda records: None) -> None:
        """Do what is missing; `on_response` sees the items of each response once they are written."""
        for window in self.settings.window:
            responses = self.missing(window)
            if responses:
                with self.make_engine(window, len(responses)) as engine:
                    self._run(engine, responses, on_response)

    def _run(self, engine: Engine, responses: Iterable[Response], on_response: Callable[[list[Record]], None]) -> None:
        waiting, under_way = deque(responses), 0
        grading: set[Future[list[Record]]] = set()
        longest = max(self.settings.max_tokens)
        with ThreadPoolExecutor(PROCESSES) as graders:
            try:
                while waiting or under_way or grading:
                    while waiting and under_way < 2 * engine.max_num_seqs:  # as many in line as can run
                        response = waiting.popleft()
                        engine.add_request(response, response.question.prompt, self._sampling(response, longest))
                        under_way += 1
                    if engine.has_unfinished:
                        for output in engine.step():
                            under_way -= 1
                            grading.add(graders.submit(self._records, output, engine.schedule))
                    done, grading = wait(grading, 0 if under_way else None, FIRST_COMPLETED)
                    for future in done:
                        records = future.result()
                        self.folder.add(records)
                        on_response(records)
            except BaseException:
                graders.shutdown(wait=False, cancel_futures=True)
                raise

    def _sampling(self, response: Response, max_tokens: int) -> SamplingParams:
        settings = self.settings
        return SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_tokens=max_tokens,
            seed=item_seed(settings.seed, response.question.row, response.sample),
        )

    def _records(self, output: RolloutOutput, schedule: Schedule) -> list[Record]:
        """The items of a response. Budgets that leave it the same text share one grading."""
        response: Response = output.request_id
        question, scores, records = response.question, {}, []
        for item in response.missing:
            part = cut(output, item.max_tokens, len(question.prompt), schedule)
            text = self.tokenizer.decode(part.token_ids, skip_special_tokens=True)
            if text not in scores:
                scores[text] = self.scorer(question, text)
            answer, score, unparsed = scores[text]
            records.append(
                Record(
                    *item,
                    tokens=len(part.token_ids),
                    finish_reason=part.finish_reason,
                    num_evictions=part.num_evictions,
                    peak_cache_tokens=part.peak_cache_tokens,
                    answer=answer,
                    score=score,
                    unparsed=unparsed,
                    text=text if self.settings.text else None,
                )
            )
        return records
