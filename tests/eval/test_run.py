r"""A whole evaluation, on an engine that says what it is told to, and the numbers it ends in."""

import json
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from eval_parts import open_folder, question, record, settings
from transformers import AutoTokenizer
from verl_run import make_model

from verl_pte import PTEConfig, RolloutOutput
from verl_pte.eval.items import cut
from verl_pte.eval.questions import Question
from verl_pte.eval.run import Evaluation
from verl_pte.eval.scoring import MathScorer, Score
from verl_pte.eval.summary import summarize


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("model")))


class ScriptedEngine:
    """Gives each prompt its next text; prompts are told apart by their first token. Finishes the newest first."""

    max_num_seqs = 2

    def __init__(self, tokenizer, texts: dict[int, list[str]], window: int | None) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.schedule = PTEConfig(window=window, block_size=8).schedule()
        self.asked: deque = deque()
        self.most = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.asked)

    def add_request(self, request_id, prompt, sampling) -> None:
        self.asked.append((request_id, prompt[0], sampling))
        self.most = max(self.most, len(self.asked))

    def step(self) -> list[RolloutOutput]:
        request, first, sampling = self.asked.pop()
        ids = self.tokenizer(self.texts[first][request.sample]).input_ids
        output = RolloutOutput(request, 0, ids, [0.0] * len(ids), "stop", 0, 3 + len(ids))
        return [cut(output, sampling.max_tokens, 3, self.schedule)]


TEXTS = {
    0: [r"\boxed{7}", r"\boxed{8}", r"\boxed{8}", "no idea"],
    1: [r"it takes a while: \boxed{7}"] * 4,
}


def evaluate(tokenizer, path: Path, windows=(None, 16), max_tokens=(12, 64), scorer=None, **changed):
    """The items of the scripted engine, and the engines that were made."""
    made = []

    @contextmanager
    def make(window, num_responses):
        made.append(ScriptedEngine(tokenizer, TEXTS, window))
        yield made[-1]

    wanted = settings(window=windows, max_tokens=max_tokens, n=4, **changed)
    questions = [question(row, prompt=(row, 2, 3)) for row in (0, 1)]
    with open_folder(path) as folder:
        Evaluation(wanted, questions, tokenizer, scorer or MathScorer(), folder, make).run()
    return folder, wanted, made


def test_scripted_answers_end_in_hand_computed_numbers(tokenizer, tmp_path: Path) -> None:
    folder, wanted, made = evaluate(tokenizer, tmp_path)
    assert [engine.schedule.window for engine in made] == [None, 16]
    assert all(engine.most == 4 for engine in made), "kept busy: as many in line as run"
    summary = summarize(folder.records(), wanted.ks)
    assert summary["n"] == 4 and summary["rows"] == {"set": 2} and "mean_of_sets" not in summary
    cells = {(cell["window"], cell["max_tokens"]): cell for cell in summary["cells"]}
    assert list(cells) == [(16, 12), (16, 64), (None, 12), (None, 64)]

    def passes(window, max_tokens):
        return [cells[window, max_tokens]["pass"][str(k)]["mean"] for k in (1, 2, 4)]

    for window in (16, None):
        assert passes(window, 12) == [0.125, 0.25, 0.5], "row 1 is cut off before its answer"
        assert passes(window, 64) == [0.625, 0.75, 1.0]
        short, long = cells[window, 12], cells[window, 64]
        assert (short["unparsed"], long["unparsed"]) == (5 / 8, 1 / 8)
        assert (short["truncated"], long["truncated"]) == (0.5, 0.0)
        lengths = [9, 9, 9, 7, 27, 27, 27, 27]
        assert long["tokens"] == {"mean": np.mean(lengths), "median": 18.0, "max": 27}
        assert short["tokens"]["max"] == 12
    assert cells[None, 64]["peak_cache_tokens"]["max"] == 30
    low, high = (cells[None, 64]["pass"]["1"][key] for key in ("low", "high"))
    assert (low, high) == (0.25, 1.0), "of two rows, either may be drawn twice"
    for line in folder.items.read_text().splitlines():
        kept = json.loads(line)
        text = TEXTS[kept["row"]][kept["sample"]]
        assert kept["text"] == text[: kept["max_tokens"]]
        assert kept["score"] == float(kept["answer"] == "7")


class CountingScorer:
    def __init__(self, fail_after: int | None = None) -> None:
        self.seen: list[tuple] = []
        self.fail_after = fail_after

    def __call__(self, asked: Question, text: str) -> Score:
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            raise ValueError("enough")
        self.seen.append((asked.row, text))
        return Score(None, float("7" in text), False)


def test_what_is_done_is_not_done_again(tokenizer, tmp_path: Path) -> None:
    whole = CountingScorer()
    folder, _, _ = evaluate(tokenizer, tmp_path / "whole", scorer=whole)
    assert len(whole.seen) == 2 * (4 + 4 * 2), "budgets that leave the same text share one grading"

    with pytest.raises(ValueError, match="enough"):
        evaluate(tokenizer, tmp_path / "part", scorer=CountingScorer(fail_after=5))
    items = tmp_path / "part" / "items.jsonl"
    lines = items.read_text().splitlines(keepends=True)
    assert 0 < len(lines) < 32
    items.write_text("".join(lines[:-1]) + lines[-1][:20])  # one budget of a response is there, the other torn
    rest = CountingScorer()
    part, _, made = evaluate(tokenizer, tmp_path / "part", scorer=rest)
    assert sorted(part.items.read_text().splitlines()) == sorted(folder.items.read_text().splitlines())
    assert summarize(part.records(), (1, 4)) == summarize(folder.records(), (1, 4))
    assert len(rest.seen) < len(whole.seen)
    nothing = CountingScorer()
    _, _, made = evaluate(tokenizer, tmp_path / "part", scorer=nothing)
    assert nothing.seen == [] and made == []


def test_texts_may_be_left_out(tokenizer, tmp_path: Path) -> None:
    folder, _, _ = evaluate(tokenizer, tmp_path, text=False, scorer=CountingScorer())
    assert all("text" not in json.loads(line) for line in folder.items.read_text().splitlines())


def test_sets_count_the_same() -> None:
    """Whatever their sizes: the mean of sets is the mean of their means."""
    records = [record(row, score=1.0, data="small") for row in range(2)]
    records += [record(row, score=0.0, data="large") for row in range(20)]
    summary = summarize(records, (1,))
    assert [cell["data"] for cell in summary["cells"]] == ["large", "small"]
    assert summary["mean_of_sets"] == [
        {"window": 16, "max_tokens": 8, "pass": {"1": {"mean": 0.5, "low": 0.5, "high": 0.5}}}
    ]
    assert summarize(records[::-1], (1,)) == summary
