"""``verl-pte evaluate`` over windows, budgets, sets and baselines."""

from pathlib import Path

import pandas as pd
import pytest
from evaluate_run import MAX_TOKENS, ROWS, N, arguments, items, succeed, summary, with_adapter, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from verl_pte import PTEConfig, RolloutEngine, SamplingParams, attach
from verl_pte.cli import app
from verl_pte.eval.items import item_seed


@pytest.fixture(scope="module")
def swept(folder: Path) -> Path:
    """The adapter under two windows and a full cache, with three budgets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADED", str(folder / "graded"))
        succeed(folder, folder / "swept", with_adapter(folder), "--window=16,32,0", f"--max-tokens=20,{MAX_TOKENS},40")
    return folder / "swept"


def test_a_shorter_budget_is_what_it_would_have_been_alone(swept: Path, folder: Path, tmp_path: Path) -> None:
    """Generated anew with that budget: the same responses, evictions, peaks and scores."""
    found = items(swept)
    assert len(found) == 3 * 3 * ROWS * N
    for window, max_tokens in ((16, 20), (16, 40), (32, 40), (0, 40)):
        named = (f"--window={window}", f"--max-tokens={max_tokens}")
        alone = succeed(folder, tmp_path / f"{window}-{max_tokens}", with_adapter(folder), *named)
        assert len(alone) == ROWS * N
        assert {key: found[key] for key in alone} == alone
    assert {item["finish_reason"] for key, item in found.items() if key[4] == 40} == {"stop", "length"}


def test_windows_bound_the_cache(swept: Path) -> None:
    cells = {(cell["window"], cell["max_tokens"]): cell for cell in summary(swept)["cells"]}
    assert list(cells) == [(w, m) for w in (16, 32, None) for m in (20, 40, 60)]
    assert cells[16, 60]["evictions"]["mean"] > cells[32, 60]["evictions"]["mean"] > 0
    assert cells[None, 60]["evictions"]["max"] == 0
    longest = 48  # the prompts, in blocks of 8
    for window in (16, 32):
        assert cells[window, 60]["peak_cache_tokens"]["max"] <= longest + window
    texts = {key[:4]: item["text"] for key, item in items(swept).items() if key[4] == 60}
    assert any(texts[("questions", 0, s, 16)] != texts[("questions", 0, s, None)] for s in range(N))


def test_figures(swept: Path, whole: Path) -> None:
    figures = {"accuracy_over_window.png", "accuracy_over_length.png", "lengths.png"}
    assert {path.name for path in swept.glob("*.png")} == figures
    assert {path.name for path in whole.glob("*.png")} == {"lengths.png"}, "one value is no sweep"
    assert all((swept / name).stat().st_size > 1000 for name in figures)


def test_baselines_are_the_untouched_model(swept: Path, folder: Path, tmp_path: Path) -> None:
    """Under eviction only; with an adapter beside it, evicting as that adapter does (half of the window at once)."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = pd.read_parquet(folder / "questions.parquet")["prompt"]
    prompts = [tokenizer.apply_chat_template(list(p), add_generation_prompt=True, return_dict=False) for p in rows]

    def untouched(**pte) -> dict[tuple, tuple]:
        base = attach(
            AutoModelForCausalLM.from_pretrained(folder / "model"), PTEConfig(rank=2, freeze_state=True, **pte)
        )
        engine = RolloutEngine(base, tokenizer, max_num_seqs=5, max_prompt_length=100, max_response_length=MAX_TOKENS)
        out = {}
        for row, prompt in enumerate(prompts):
            for sample in range(N):
                sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=item_seed(0, row, sample))
                (output,) = engine.generate([prompt], sampling)
                text = tokenizer.decode(output.token_ids, skip_special_tokens=True)
                out[row, sample] = (text, output.num_evictions, output.peak_cache_tokens)
        return out

    def evaluated(name: str, *more: str) -> dict[tuple, tuple]:
        found = succeed(folder, tmp_path / name, *more)
        return {
            key[1:3]: (item["text"], item["num_evictions"], item["peak_cache_tokens"]) for key, item in found.items()
        }

    alone = evaluated("alone", "--baseline=window", "--window=16")
    assert alone == untouched(window=16) == evaluated("plain", "--window=16")
    beside = evaluated("beside", "--baseline=window", with_adapter(folder))
    assert beside == untouched(window=16, evict_fraction=0.5, block_size=4) != alone
    full = evaluated("full", "--baseline=full")
    assert full == untouched(window=None) == evaluated("zero", "--window=0")
    assert full == evaluated("full beside", "--baseline=full", with_adapter(folder))
    adapted = {key[1:3]: item["text"] for key, item in items(swept).items() if key[3:] == (16, MAX_TOKENS)}
    assert any(adapted[key] != beside[key][0] for key in adapted), "the adapter does something"


def test_several_sets(whole: Path, folder: Path, tmp_path: Path, graded: Path) -> None:
    write_data(tmp_path / "more.parquet", rows=3)
    found = succeed(folder, tmp_path / "out", with_adapter(folder), f"--data={tmp_path / 'more.parquet'}")
    assert len(found) == (ROWS + 3) * N
    assert {key: item for key, item in found.items() if key[0] == "questions"} == items(whole)
    numbers = summary(tmp_path / "out")
    assert numbers["rows"] == {"more": 3, "questions": ROWS}
    means = [cell["pass"]["1"]["mean"] for cell in numbers["cells"]]
    assert numbers["mean_of_sets"][0]["pass"]["1"]["mean"] == pytest.approx(sum(means) / 2)
    assert [c for c in numbers["cells"] if c["data"] == "questions"] == summary(whole)["cells"]


def test_sets_are_prepared_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the run's folder, under their names, where a run that goes on finds them."""
    asked = []

    def prepare(name: str, output: Path) -> None:
        asked.append(name)
        if len(asked) == 1:
            raise RuntimeError("the hub is not there")
        output.parent.mkdir(parents=True)
        write_data(output, rows=2)

    monkeypatch.setattr("verl_pte.data.prepare", prepare)
    named = [a for a in arguments(folder, tmp_path / "out", "--window=16") if not a.startswith("--data")]
    result = CliRunner().invoke(app, [*named, "--data=aime-2024"])
    assert result.exit_code == 1 and "the hub is not there" in result.output
    for _ in range(2):
        result = CliRunner().invoke(app, [*named, "--data=aime-2024"])
        assert result.exit_code == 0, result.output
        assert asked == ["aime-2024"] * 2
    assert {key[0] for key in items(tmp_path / "out")} == {"aime-2024"}
    assert (tmp_path / "out" / "data" / "aime-2024.parquet").is_file()
