"""``verl-pte evaluate`` on tiny models: what a killed run ends in, sweeps, baselines, figures, and what is refused.

The numbers' mathematics is tested in test_eval.py, vLLM in vllm/test_evaluate.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from verl_run import PTE, make_adapter, make_model

from verl_pte import PTEConfig, RolloutEngine, SamplingParams, attach
from verl_pte.cli import app
from verl_pte.eval.folder import EvaluationFolder
from verl_pte.eval.items import item_seed
from verl_pte.peft.saved import load, saved_config

COMMAND = Path(sys.executable).with_name("verl-pte")
ROOT = Path(__file__).resolve().parents[1]
ROWS, N, MAX_TOKENS = 6, 3, 60
REWARD = """
import os

def vowels(data_source, solution_str, ground_truth, extra_info):
    with open(os.environ["GRADED"], "a") as graded:
        graded.write(f"{extra_info['index']}\\n")
    return float(solution_str.count("a") % 2)
"""


def write_data(path: Path, rows: int = ROWS, **changed) -> Path:
    """Questions of verl's format."""
    row = {
        "data_source": "digits",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"},
    }
    prompts = [[{"role": "user", "content": f"{i} + {i * 7 % 10} = " + "?" * (i % 4)}] for i in range(rows)]
    made = [row | {"prompt": prompt, "extra_info": {"index": i}} | changed for i, prompt in enumerate(prompts)]
    pd.DataFrame(made).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with model/, adapter/, questions.parquet and reward.py; sampled responses end early now and then."""
    path = tmp_path_factory.mktemp("evaluate")
    make_model(path / "model", initializer_range=0.3)
    make_adapter(path, path / "adapter", evict_fraction=0.5, block_size=4)
    write_data(path / "questions.parquet")
    (path / "reward.py").write_text(REWARD)
    return path


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    named = {
        "model": folder / "model",
        "data": folder / "questions.parquet",
        "output": output,
        "n": N,
        "max-tokens": MAX_TOKENS,
        "max-num-seqs": 4,
        "reward": f"{folder}/reward.py:vowels",
        "dtype": "float32",
    }
    given = {text.partition("=")[0].removeprefix("--") for text in more} - {"data"}
    return ["evaluate", *(f"--{key}={value}" for key, value in named.items() if key not in given), *more]


def with_adapter(folder: Path) -> str:
    return f"--adapter={folder / 'adapter'}"


@pytest.fixture(autouse=True)
def graded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every call of the reward function is a line here."""
    path = folder / "graded"
    path.write_text("")
    monkeypatch.setenv("GRADED", str(path))
    monkeypatch.setenv("COLUMNS", "200")
    return path


def run(folder: Path, output: Path, *more: str):
    return CliRunner().invoke(app, arguments(folder, output, *more))


def succeed(folder: Path, output: Path, *more: str) -> dict[tuple, dict]:
    result = run(folder, output, *more)
    assert result.exit_code == 0, result.output
    return items(output)


def items(output: Path) -> dict[tuple, dict]:
    """What is in items.jsonl, which holds no item twice."""
    lines = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    found = {tuple(line[key] for key in ("data", "row", "sample", "window", "max_tokens")): line for line in lines}
    assert len(found) == len(lines), "an item is there twice"
    return found


def summary(output: Path) -> dict:
    return json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The folder of an evaluation of the adapter that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADED", str(folder / "graded"))
        patch.setenv("COLUMNS", "200")
        result = run(folder, folder / "whole", with_adapter(folder))
    assert result.exit_code == 0, result.output
    assert f"numbers: {folder / 'whole' / 'summary.json'}" in result.stdout
    assert re.search(rf"questions +{PTE['window']} +{MAX_TOKENS} +[\d.]+ \[[\d.]+, [\d.]+\] ", result.stdout)
    assert f"responses {ROWS * N}/{ROWS * N}" in result.stderr
    return folder / "whole"


# -- a run
# --------------------------------------------------------------------------------------------------------------


def test_items_are_what_the_engine_generates(whole: Path, folder: Path) -> None:
    """One by one, with the seed of the item; the score is the reward function's of the text."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = load(str(folder / "model"), str(folder / "adapter"), saved_config(str(folder / "adapter")))
    engine = RolloutEngine(model, tokenizer, max_num_seqs=1, max_prompt_length=100, max_response_length=MAX_TOKENS)
    found = items(whole)
    assert len(found) == ROWS * N
    rows = pd.read_parquet(folder / "questions.parquet")["prompt"]
    for (data, row, sample, window, max_tokens), item in found.items():
        assert (data, window, max_tokens) == ("questions", PTE["window"], MAX_TOKENS)
        prompt = tokenizer.apply_chat_template(list(rows[row]), add_generation_prompt=True, return_dict=False)
        sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=item_seed(0, row, sample))
        (output,) = engine.generate([prompt], sampling)
        assert item["text"] == tokenizer.decode(output.token_ids, skip_special_tokens=True)
        assert item["tokens"] == len(output.token_ids)
        for key in ("finish_reason", "num_evictions", "peak_cache_tokens"):
            assert item[key] == getattr(output, key)
        assert item["score"] == item["text"].count("a") % 2
    assert {item["finish_reason"] for item in found.values()} == {"stop", "length"}
    assert max(item["num_evictions"] for item in found.values()) >= 3
    cell = summary(whole)["cells"][0]
    assert cell["pass"]["1"]["mean"] == pytest.approx(sum(item["score"] for item in found.values()) / len(found))
    assert cell["truncated"] == sum(item["finish_reason"] == "length" for item in found.values()) / len(found)
    assert list(cell["pass"]) == ["1", "2", "3"]


def test_batches_do_not_matter(whole: Path, folder: Path, tmp_path: Path) -> None:
    for size in (1, 18):
        assert succeed(folder, tmp_path / str(size), with_adapter(folder), f"--max-num-seqs={size}") == items(whole)
        assert summary(tmp_path / str(size)) == summary(whole)
    other = succeed(folder, tmp_path / "seed", with_adapter(folder), "--seed=1")
    assert other.keys() == items(whole).keys()
    assert not {i["text"] for i in other.values()} & {i["text"] for i in items(whole).values()}


def test_math_is_graded_where_no_reward_is_given(folder: Path, tmp_path: Path) -> None:
    arguments_ = [a for a in arguments(folder, tmp_path / "out", with_adapter(folder)) if not a.startswith("--reward")]
    result = CliRunner().invoke(app, arguments_)
    assert result.exit_code == 0, result.output
    assert summary(tmp_path / "out")["cells"][0]["unparsed"] == 1.0, "random letters are no mathematics"
    assert {item["answer"] for item in items(tmp_path / "out").values()} == {None}


# -- stopped and continued
# ----------------------------------------------------------------------------------------------


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_evaluation_ends_in_the_same_numbers(whole: Path, folder: Path, tmp_path: Path, graded: Path) -> None:
    """Killed twice, and a line that is half written."""
    output = tmp_path / "killed"
    log = output / "items.jsonl"
    for lines in (3, 8):
        command = [COMMAND, *arguments(folder, output, with_adapter(folder), "--max-num-seqs=1")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda lines=lines: log.exists() and log.read_bytes().count(b"\n") >= lines, process)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        assert not (output / "summary.json").exists()
    done = log.read_bytes().count(b"\n")
    assert 8 <= done < ROWS * N
    with log.open("ab") as file:
        file.write(b'{"data": "questions", "row": 5, "sa')
    graded.write_text("")
    result = run(folder, output, with_adapter(folder))
    assert result.exit_code == 0 and f"{done} of {ROWS * N} responses are there already" in result.output
    assert items(output) == items(whole)
    assert (output / "summary.json").read_text() == (whole / "summary.json").read_text()
    assert graded.read_text().count("\n") == ROWS * N - done, "what was there was graded again"


def test_ctrl_c_says_how_to_go_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = EvaluationFolder.add

    def stop_after_the_first(self, records) -> None:
        add(self, records)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationFolder, "add", stop_after_the_first)
        result = run(folder, tmp_path / "out", with_adapter(folder))
    assert result.exit_code == 130
    assert re.search(rf"stopped after [01] of {ROWS * N} responses; the same command goes on", result.output)
    assert len(items(tmp_path / "out")) == 1
    assert len(succeed(folder, tmp_path / "out", with_adapter(folder))) == ROWS * N


def test_a_finished_evaluation_is_only_summed_up(whole: Path, folder: Path, graded: Path) -> None:
    before = (whole / "items.jsonl").read_bytes()
    result = run(folder, whole, with_adapter(folder), "--k=2", "--max-num-seqs=1")
    assert result.exit_code == 0 and "numbers: " in result.output
    assert (whole / "items.jsonl").read_bytes() == before and graded.read_text() == ""
    assert list(summary(whole)["cells"][0]["pass"]) == ["1", "2"]
    assert run(folder, whole, with_adapter(folder)).exit_code == 0


def test_another_setting_is_refused(whole: Path, folder: Path, tmp_path: Path) -> None:
    other = write_data(tmp_path / "questions.parquet", rows=5)
    (tmp_path / "reward.py").write_text(REWARD + "# other\n")
    make_adapter(folder, tmp_path / "adapter", alpha=4.0)
    before = (whole / "items.jsonl").read_bytes()
    for changed, message in (
        ("--n=4", "--n 4: --output"),
        ("--max-tokens=50", "--max-tokens 50: .* with 60"),
        ("--window=16,full", "--window 16,full: .* with 16"),
        ("--temperature=0.5", "--temperature 0.5: "),
        ("--seed=1", "--seed 1: "),
        ("--dtype=bfloat16", "--dtype bfloat16: "),
        ("--no-text", "--text False: "),
        (f"--reward={tmp_path}/reward.py:vowels", "--reward vowels of reward.py, digest"),
        (f"--adapter={tmp_path}/adapter", "--adapter .*digest"),
        ("--baseline=window", "--adapter None: "),
    ):
        result = run(folder, whole, *([] if "--adapter" in changed else [with_adapter(folder)]), changed)
        assert result.exit_code == 2 and re.search(message, result.output.replace("\n", " ")), result.output
        assert "holds a run with" in result.output
    named = [a for a in arguments(folder, whole, with_adapter(folder)) if not a.startswith("--data")]
    result = CliRunner().invoke(app, [*named, f"--data={other}"])
    assert result.exit_code == 2 and "--data {'questions': '5 rows of digest" in result.output
    assert (whole / "items.jsonl").read_bytes() == before


# -- sweeps, baselines, sets
# --------------------------------------------------------------------------------------------


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


# -- refused
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(folder: Path) -> Path:
    """Adapters, models and files that do not fit."""
    path = folder / "wrong"
    for name, changed in (("deep", {"num_hidden_layers": 3}), ("wide", {"hidden_size": 64})):
        make_model(path / name, initializer_range=0.3, **changed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = None
    make_model(path / "speechless")
    (path / "speechless" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(path / "speechless")
    write_data(path / "unanswered.parquet", reward_model={"style": "rule", "ground_truth": None})
    pd.DataFrame({"prompt": ["x"]}).to_parquet(path / "strings.parquet")
    (path / "broken.parquet").write_text("x")
    (path / "foreign").mkdir()
    (path / "foreign" / "thesis.txt").write_text("")
    return path


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model=nowhere/at/all", "--window=16"], "model=nowhere/at/all: no such directory"),
        (["--model={wrong}/speechless", "--window=16"], "no chat template"),
        ([], "--adapter DIR is missing; for the base model alone give --baseline full, or --baseline window"),
        (["--baseline=window"], "--adapter DIR is missing"),
        (["--baseline=full", "--window=16"], "--window: there is none with --baseline full"),
        (["--baseline=window", "--window=16,0"], "--window full: is no window for --baseline window"),
        (["--adapter={wrong}"], "has no adapter_config.json"),
        (
            ["--adapter={folder}/adapter", "--model={wrong}/wide"],
            "is .32, 4., and .* it is .64, 4.*or the base another one",
        ),
        (["--adapter={folder}/adapter", "--model={wrong}/deep"], "layers.2.* is missing, .* or the base another one"),
        (["--window=20"], "window=20: must be a multiple of block_size=16"),
        (["--window=16,16"], "--window: 16 is there twice"),
        (["--window=16", "--k=5"], r"--k 5: must be in \[1, --n 3\]"),
        (["--window=16", "--max-tokens=3k"], "--max-tokens 3k: must be a number from 1 on"),
        (["--window=16", "--max-tokens=100,1000"], "--max-tokens 1000: with the prompt of row .*positions: give fewer"),
        (["--window=16", "--dtype=int8"], "dtype=int8: must be one of"),
        (["--window=16", "--reward=nowhere.py:f"], "--reward nowhere.py:f: must be path.py:function"),
        (["--window=16", "--data=nowhere.parquet"], "--data nowhere.parquet: no such file, and no set of that name"),
        (["--window=16", "--data={folder}/questions.parquet"], "there are two of the name questions"),
        (["--window=16", "--data={wrong}/unanswered.parquet"], "must have a ground_truth"),
        (["--window=16", "--data={wrong}/strings.parquet"], "no column data_source"),
        (["--window=16", "--data={wrong}/broken.parquet"], "not a parquet file"),
        (["--window=16", "--output={wrong}/foreign"], "holds thesis.txt and no evaluation"),
        (["--window=16", "--", "--enforce-eager"], "vLLM's options need --engine vllm"),
    ],
)
def test_bad_input_ends_early_with_a_line(folder: Path, wrong: Path, more: list[str], message: str) -> None:
    result = run(folder, folder / "never", *(text.format(folder=folder, wrong=wrong) for text in more))
    assert result.exit_code == 2, (result.output, result.exception)
    assert re.search(message, " ".join(result.output.split())), result.output
    assert not (folder / "never").exists()


def test_grading_without_math_verify(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    asked = [a for a in arguments(folder, folder / "never", "--window=16") if not a.startswith("--reward")]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2 and "pip install 'verl-pte[eval]'" in result.output, result.output


def test_a_reward_that_fails_ends_the_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def f(**kwargs):\n    return 1 / 0\n")
    result = run(folder, tmp_path / "out", "--window=16", f"--reward={tmp_path}/reward.py:f")
    assert result.exit_code == 2 and "raised ZeroDivisionError" in result.output


def test_command_of_the_documentation_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, with a tiny model in place of the reader's."""
    block = re.search(r"^((?:    .*\n)+)", (ROOT / "docs" / "evaluation.md").read_text(), flags=re.M)[1]
    command = block.replace("\\\n", " ").replace("path/to/model", str(folder / "model"))
    program, *arguments_ = command.replace("path/to/adapter", str(folder / "adapter")).split()
    assert program == "verl-pte"
    write_data(tmp_path / "questions.parquet", rows=2)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments_)
    assert result.exit_code == 0, result.output
    assert len(items(tmp_path / "scores")) == 2 * 4 * 3 * 2
    written = re.findall(
        r"^      (\w[\w.]+)(?:, (\w[\w.]+))? ", (ROOT / "docs" / "evaluation.md").read_text(), flags=re.M
    )
    promised = {name for names in written for name in names if name}
    assert {path.name for path in (tmp_path / "scores").iterdir()} == promised
