r"""Evaluation without a model: pass@k, intervals, items, scores, the folder, and the numbers they end in."""

import itertools
import json
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from math import comb
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from verl_run import make_model

from verl_pte import PTEConfig, RolloutOutput, SamplingParams
from verl_pte.distill.folder import RunFolder
from verl_pte.eval.folder import EvaluationFolder
from verl_pte.eval.intervals import bootstrap_means, interval
from verl_pte.eval.items import Item, Record, cut, item_seed
from verl_pte.eval.pass_at_k import best_of_k, pass_at_k, powers_of_two
from verl_pte.eval.questions import Question
from verl_pte.eval.run import Evaluation
from verl_pte.eval.scoring import MathScorer, OwnScorer, Score
from verl_pte.eval.settings import EvaluateSettings, parse_counts, parse_windows
from verl_pte.eval.summary import summarize

# -- pass@k
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),
        (4, 2, 2, 1 - 1 / 6),
        (4, 1, 4, 1.0),
        (4, 0, 4, 0.0),
        (5, 2, 3, 0.9),
        (10, 3, 5, 1 - 21 / 252),
        (16, 1, 8, 0.5),
        (16, 15, 2, 1.0),
    ],
)
def test_pass_at_k_of_hand_cases(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)
    assert pass_at_k(n, c, k) == 1 - comb(n - c, k) / comb(n, k)


def test_pass_at_k_counts_the_draws() -> None:
    """Of all ways to draw k of n samples, those with a right one; of other scores, the mean of the best."""
    for n, k in itertools.product(range(1, 8), range(1, 8)):
        if k > n:
            continue
        draws = list(itertools.combinations(range(n), k))
        for c in range(n + 1):
            hits = sum(any(i < c for i in draw) for draw in draws)
            assert pass_at_k(n, c, k) == pytest.approx(hits / len(draws), abs=1e-12)
            assert best_of_k([1.0] * c + [0.0] * (n - c), k) == pass_at_k(n, c, k)
        scores = [0.3, -1.0, 0.3, 2.0, 0.0, 1.0, 0.75][:n]
        best = np.mean([max(scores[i] for i in draw) for draw in draws])
        assert best_of_k(scores, k) == pytest.approx(best, abs=1e-12)


def test_pass_at_k_of_many_samples_is_finite() -> None:
    assert pass_at_k(4096, 1, 2048) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        pass_at_k(n, c, k)
    if k > n:
        with pytest.raises(ValueError, match="must be in"):
            best_of_k([0.5] * n, k)


def test_which_k() -> None:
    assert [powers_of_two(n) for n in (1, 2, 3, 4, 16, 17)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4),
        (1, 2, 4, 8, 16),
        (1, 2, 4, 8, 16, 17),
    ]


# -- intervals
# ----------------------------------------------------------------------------------------------------------


def test_an_interval_is_that_of_the_binomial() -> None:
    """Half of 400 rows right: a resampled mean has a standard deviation of 0.025."""
    values = np.array([[1.0, 0.0]] * 200 + [[0.0, 0.0]] * 200)
    low, high = interval(bootstrap_means(values, "set"))
    assert low[0] == pytest.approx(0.5 - 1.96 * 0.025, abs=0.003)
    assert high[0] == pytest.approx(0.5 + 1.96 * 0.025, abs=0.003)
    assert low[1] == high[1] == 0.0


def test_an_interval_covers_what_it_says() -> None:
    """Of 300 data sets of 60 questions, about 95 of 100 intervals hold the mean they were drawn with."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        low, high = interval(bootstrap_means(generator.random((60, 1)) < 0.4, "set", resamples=1000))
        held += low[0] <= 0.4 <= high[0]
    assert 0.90 <= held / 300 <= 0.98


def test_resampling_is_repeatable_and_paired() -> None:
    values = np.random.default_rng(0).random((30, 2))
    means = bootstrap_means(values, "a", resamples=500)
    assert np.array_equal(means, bootstrap_means(values, "a", resamples=500))
    assert not np.array_equal(means, bootstrap_means(values, "b", resamples=500))
    alone = bootstrap_means(values[:, 1:], "a", resamples=500)
    assert np.allclose(means[:, 1:], alone, atol=1e-12), "columns see the same rows"
    assert bootstrap_means(values[:1], "a", resamples=5).shape == (5, 2)


# -- items
# --------------------------------------------------------------------------------------------------------------


def test_seeds_differ_by_run_row_and_sample() -> None:
    seeds = {item_seed(seed, row, sample) for seed in range(3) for row in range(20) for sample in range(20)}
    assert len(seeds) == 3 * 20 * 20
    assert item_seed(0, 1, 2) == item_seed(0, 1, 2)
    SamplingParams(seed=max(seeds))


def test_a_longer_budget_cuts_only_what_is_longer() -> None:
    schedule = PTEConfig(window=16, block_size=8).schedule()
    output = RolloutOutput(None, 0, list(range(30)), [0.0] * 30, "stop", 9, 99)
    assert cut(output, 30, 10, schedule) is output
    assert cut(output, 31, 10, schedule) is output
    part = cut(output, 29, 10, schedule)
    assert part.token_ids == list(range(29)) and part.finish_reason == "length"
    # 10 prompt tokens pin 16; with 28 thought tokens run, positions 32 and 40 would evict: 38 are there, once evicted.
    assert (part.num_evictions, part.peak_cache_tokens) == (1, 32)
    assert cut(output, 5, 10, schedule).peak_cache_tokens == 14
    assert cut(output, 29, 10, schedule.full()).peak_cache_tokens == 38


# -- settings
# -----------------------------------------------------------------------------------------------------------


def settings(**changed) -> EvaluateSettings:
    given = dict(model="m", adapter=None, baseline=None, engine="native", window=(16,), max_tokens=(8,))
    return EvaluateSettings(**(given | changed))


def test_lists() -> None:
    assert parse_windows(["768,1024", "0", "2048, full"]) == (768, 1024, None, 2048, None)
    assert parse_counts("max_tokens", ["3072,6144", "12288"]) == (3072, 6144, 12288)
    for text in ("", "-1", "3k", "1.5", "0"):
        with pytest.raises(ValueError, match=f"--max-tokens {text}: must be a number from 1 on"):
            parse_counts("max_tokens", [text])
    with pytest.raises(ValueError, match="--window x: must be"):
        parse_windows(["16,x"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 0}, "--n 0: must be at least 1"),
        ({"n": 4, "k": (1, 8)}, r"--k 8: must be in \[1, --n 4\]"),
        ({"n": 2, "temperature": 0.0}, "--n 2: with --temperature 0 all samples are the same"),
        ({"temperature": -1.0}, "--temperature -1.0: must be >= 0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_k": -1}, "--top-k -1"),
        ({"window": (16, 32, 16)}, "--window: 16 is there twice"),
        ({"window": (None, 32, None)}, "--window: full is there twice"),
        ({"max_tokens": (8, 8)}, "--max-tokens: 8 is there twice"),
    ],
)
def test_settings_refuse(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changed)


def test_which_k_are_computed() -> None:
    assert settings(n=6).ks == (1, 2, 4, 6)
    assert settings(n=6, k=(5,)).ks == (1, 5), "pass@1 always is"
    assert settings(n=6).identity() == settings(n=6, k=(5,)).identity()
    assert settings(window=(16, None)).identity()["window"] == "16,full"


# -- scores
# -------------------------------------------------------------------------------------------------------------


def question(row: int = 0, truth: str = "7", data: str = "set", prompt: tuple = (1, 2, 3)) -> Question:
    return Question(data, row, list(prompt), truth, "source", {"index": row})


def test_math_is_graded() -> None:
    scorer = MathScorer()
    assert scorer(question(truth="0.5"), r"so \boxed{\frac12}") == Score(r"\frac12", 1.0, False)
    assert scorer(question(), r"so \boxed{8}") == Score("8", 0.0, False)
    assert scorer(question(), "who knows") == Score(None, 0.0, True)


REWARD = """
def number(data_source, solution_str, ground_truth, extra_info):
    assert (data_source, ground_truth, extra_info) == ("source", "7", {"index": 0})
    return len(solution_str)

def facts(data_source, solution_str, ground_truth, extra_info):
    return {"score": -1.0, "acc": True, "pred": 3, "unparsed": 1.0}

def score_only(**kwargs):
    return {"score": 0.25}

def fails(**kwargs):
    raise KeyError("x")

def nothing(**kwargs):
    return None

not_callable = 1
"""


def test_scores_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text(REWARD)

    def score(name: str) -> Score:
        return OwnScorer(f"{path}:{name}")(question(), "four")

    assert score("number") == Score(None, 4.0, False)
    assert score("facts") == Score("3", 1.0, True), "acc is what verl's validation takes"
    assert score("score_only") == Score(None, 0.25, False)
    for name, message in (
        ("fails", r"raised KeyError\('x'\) for row 0"),
        ("nothing", "returned None for row 0; must be a number"),
        ("not_callable", "has no function not_callable"),
        ("missing", "has no function missing"),
    ):
        with pytest.raises(ValueError, match=message):
            score(name)
    for given in (str(path), f"{tmp_path}/none.py:number", f"{tmp_path}:number"):
        with pytest.raises(ValueError, match="must be path.py:function"):
            OwnScorer(given)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(ValueError, match="cannot be loaded"):
        OwnScorer(f"{tmp_path}/broken.py:number")


# -- the folder
# ---------------------------------------------------------------------------------------------------------


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


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        folder.add([record(0), record(1, window=None)])
        folder.add([record(2)])
    whole = folder.items.read_bytes()
    for end in range(len(whole.splitlines()[0]) + 1, len(whole)):
        folder.items.write_bytes(whole[:end])
        with open_folder(tmp_path) as again:
            lines = whole[:end].count(b"\n")
            assert again.items.read_bytes().count(b"\n") == len(again.done) == lines
            again.add([r for r in (record(1, window=None), record(2)) if r.item not in again.done])
        assert again.items.read_bytes() == whole
    assert [r.item for r in folder.records()] == [Item("set", 0, 0, 16, 8), Item("set", 1, 0, None, 8), record(2).item]
    assert next(iter(folder.records())).text is None
    assert json.loads(whole.splitlines()[0])["text"] == "\u2028 a\nb"


def test_no_item_is_there_twice(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        folder.add([record(0)])
        with pytest.raises(ValueError, match="is done"):
            folder.add([record(0, score=1.0)])
    folder.items.write_bytes(folder.items.read_bytes() * 2)
    with pytest.raises(ValueError, match="line 2: .* is there twice"), open_folder(tmp_path):
        pass
    folder.items.write_text('{"row": 1}\n')
    with pytest.raises(ValueError, match="line 1: is no item"), open_folder(tmp_path):
        pass


def test_one_process_writes(tmp_path: Path) -> None:
    """The lock is of an open file, so a second one of this process stands for another process."""
    with open_folder(tmp_path):
        claimed = (tmp_path / "settings.json").read_text()
        with pytest.raises(ValueError, match="another process is evaluating into it"), open_folder(tmp_path, n=2):
            pass
        assert (tmp_path / "settings.json").read_text() == claimed, "not the other one's, although nothing was done yet"
    with open_folder(tmp_path):
        pass


def test_whose_folder_it_is(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        folder.check_free()
    with open_folder(tmp_path, n=2):  # nothing was done yet
        pass
    with open_folder(tmp_path) as folder:
        folder.add([record()])
    with open_folder(tmp_path):
        pass
    with pytest.raises(ValueError, match="--n 2: --output .* holds a run with 1"), open_folder(tmp_path, n=2):
        pass
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="holds items and does not say of which"), open_folder(tmp_path):
        pass
    warm = tmp_path / "warm"
    RunFolder(str(warm)).claim({"steps": 7})
    with pytest.raises(ValueError, match="settings.json is of another kind of run"):
        EvaluationFolder(str(warm)).check_free()
    assert RunFolder(str(warm)).settings == {"steps": 7}
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    EvaluationFolder(str(other)).check_free()
    (other / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="holds thesis.txt and no evaluation"):
        EvaluationFolder(str(other)).check_free()
    with pytest.raises(ValueError, match="must be a folder, this is a file"):
        EvaluationFolder(str(other / "thesis.txt")).check_free()


# -- the run, on an engine that says what it is told to
# ----------------------------------------------------------------------


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
