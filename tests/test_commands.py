"""Every command of the documentation is run by a test, or says that it needs what tests do not have.

A command is a line of a code block that begins with one of `PROGRAMS`. Each has to be one of

- **marked**: a comment says `needs GPUs` or `needs the hub`, at the end of the line, or on a line of its own above and
  then for the rest of the block:

      # needs GPUs
      python -m verl.trainer.main_ppo --config-dir recipes ...

- **run by a test**, which `TESTED` names: page, pattern of the command, the test. Many run it with a tiny model, fewer
  steps or stand-ins for downloads in place of what the page names; how it ends is that test's business.

A new command that is neither fails here, with what to do. Marked ones are still checked as far as a CPU can: options
exist, recipes compose with the overrides, files are there.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from hydra import compose, initialize_config_dir
from typer.testing import CliRunner

from verl_pte.cli import app

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("*.md", "docs/**/*.md", "examples/**/*.md", "patches/*.md", "recipes/*.md")
PAGES = sorted({path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern)})
PROGRAMS = {"verl-pte", "python", "python3", "pytest", "make", "bash", "sh", "pip", "pre-commit", "mkdocs", "torchrun"}
PROGRAMS |= {
    "ray",
    "accelerate",
    "hf",
    "huggingface-cli",
    "git",
    "docker",
    "curl",
    "wget",
    "export",
    "cd",
    "tensorboard",
}
MARK = re.compile(r"\bneeds (GPUs|the hub)\b")

# Page (a glob), pattern of the whole command, and what runs it: a test, or a line of .ci/run.
TESTED = [
    (
        "docs/data.md",
        r"verl-pte prepare-data .*",
        "tests/test_prepare_data.py::test_commands_and_python_of_the_page_run",
    ),
    ("docs/doctor.md", r"verl-pte doctor.*", "tests/test_doctor.py::test_commands_of_the_documentation"),
    ("docs/scale.md", r"verl-pte doctor --for verl --for vllm", "tests/test_doctor.py::test_exit_status"),
    ("docs/export.md", r"verl-pte export .*", "tests/test_export.py::test_commands_of_the_documentation"),
    ("docs/scale.md", r"verl-pte export checkpoints/verl_pte_.*", "tests/test_export.py::test_checkpoints_of_a_run"),
    ("docs/quickstart.md", r"verl-pte (export|generate) .*", "tests/test_commands.py::test_quickstart_page"),
    ("*", r"verl-pte plan .*", "tests/test_commands.py::test_plans"),
    ("*", r"verl-pte evaluate .*", "tests/eval/command/test_refusals.py::test_command_of_the_documentation_runs"),
    ("*", r"verl-pte serve .*", "tests/vllm/test_serve.py::test_completion_is_the_oracles"),
    ("*", r"verl-pte generate .*", "tests/test_cli.py::test_native_answers_through_pipes"),
    ("*", r"python -m verl_pte\.bench rollout .*", "tests/vllm/test_bench.py::test_methods_side_by_side"),
    ("*", r"python -m verl_pte\.bench decode", "tests/test_bench_decode.py::test_command"),
    ("*", r"python -m verl_pte\.bench learner .*", "tests/test_bench_learner.py::test_methods_side_by_side"),
    ("*", r"python -m verl_pte\.bench flops .*", "tests/test_bench_flops.py::test_command_prints_one_json_object"),
    (
        "*",
        r"python -m verl_pte\.bench learning .*",
        "tests/learning/test_command.py::test_command_reports_what_is_there",
    ),
    ("*", r"python -m pytest tests/.*", ".ci/run::make test"),
    ("*", r"make quickstart", ".ci/run::make quickstart"),
    ("*", r"make (test|lint)", ".ci/run::make lint"),
    ("*", r"make (docs|format)", "tests/test_commands.py::test_make_targets"),
    ("*", r"bash examples/quickstart/run\.sh.*", ".ci/run::make quickstart"),
    ("*", r"pip install -e \S+", ".ci/run::make install"),  # `-e '.[verl,dev]'`, which has the other extras
]


class Command(NamedTuple):
    page: str
    text: str  # in one line, without comments
    note: str  # its comments

    @property
    def marked(self) -> bool:
        return MARK.search(self.note) is not None


def commands(page: str, markdown: str) -> list[Command]:
    """The commands of a page's code blocks, in order."""
    found, note, fenced, joined = [], "", False, ""
    for line in re.sub(r"^```python\n.*?^```$", "", markdown, flags=re.M | re.S).splitlines():
        if line.startswith("```"):
            fenced, note = not fenced, ""
            continue
        if not fenced and not line.startswith("    "):
            note = ""
            continue
        code = joined + line.strip()
        if code.endswith("\\"):
            joined = code[:-1].rstrip() + " "
            continue
        joined = ""
        text, _, comment = re.sub(r"\s#( |$)", "\0", code, count=1).partition("\0")
        if code.startswith("# "):
            note = code
        elif is_command(text):
            found.append(Command(page, " ".join(text.split()), f"{note} {comment}"))
    return found


def is_command(text: str) -> bool:
    words = [word for word in text.split() if not re.match(r"[A-Z][A-Z_0-9]*=", word)]
    return bool(words) and (words[0] in PROGRAMS or text.startswith("... --"))


def test_of(command: Command) -> str | None:
    """What runs a command, by `TESTED`; the first entry that fits."""
    for page, pattern, test in TESTED:
        if fnmatch(command.page, page) and re.fullmatch(pattern, command.text):
            return test
    return None


test_of.__test__ = False  # type: ignore[attr-defined]

ALL = [command for page in PAGES for command in commands(page, (ROOT / page).read_text())]
VERL_PTE = [c for c in ALL if "verl-pte" in c.text.split() and "pip" not in c.text]


def _ids(found: list[Command]) -> list[str]:
    return [f"{Path(c.page).stem}: {c.text[:60]}" for c in found]


@pytest.mark.parametrize("command", ALL, ids=_ids(ALL))
def test_is_run_by_a_test_or_marked(command: Command) -> None:
    assert command.marked or test_of(command), (
        f"{command.page}: nothing runs `{command.text}`. Write a test and name it in TESTED, or, if that is so, put a "
        "comment `# needs GPUs` or `# needs the hub` on the line above it"
    )


def test_a_new_command_is_noticed() -> None:
    blocks = [
        "    verl-pte export a --output b    # fine",
        "    # needs GPUs\n    bash a.sh \\\n        --x\n    X=1 make it",
        "    make that",
        "```bash\nray start --head\n```",
        "```python\nmake = 1\n```",
        "    data.train_files=x\n\n    ... --config-name x",
    ]
    page = "\n\n".join(blocks)
    found = commands("docs/new.md", page)
    assert [c.text for c in found] == [
        "verl-pte export a --output b",
        "bash a.sh --x",
        "X=1 make it",
        "make that",
        "ray start --head",
        "... --config-name x",
    ]
    assert [c.marked for c in found] == [False, True, True, False, False, False]
    assert [test_of(c) for c in found] == [None] * 6
    assert test_of(Command("docs/data.md", "verl-pte prepare-data x", "")) is not None


def test_many_commands_are_found() -> None:
    assert len(ALL) > 50 and {c.page for c in ALL} >= {"README.md", "docs/scale.md", "recipes/README.md"}


@pytest.mark.parametrize("entry", TESTED, ids=lambda entry: f"{entry[0]} {entry[1]}")
def test_what_runs_them_exists(entry: tuple[str, str, str]) -> None:
    page, pattern, test = entry
    assert any(fnmatch(c.page, page) and re.fullmatch(pattern, c.text) for c in ALL), "no command is like this any more"
    file, _, name = test.partition("::")
    text = (ROOT / file).read_text()
    assert re.search(rf"^{re.escape(name)}\b" if file == ".ci/run" else rf"^def {name}\(", text, flags=re.M)


# -- what can be said of all of them
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", VERL_PTE, ids=_ids(VERL_PTE))
def test_options_exist(command: Command) -> None:
    words = shlex.split(command.text)
    _parse(words[words.index("verl-pte") + 1 :])


def _parse(words: list[str]) -> None:
    """As the command line would be read; nothing is run. Raises click's error for what it does not know."""
    group = typer.main.get_command(app)
    context = group.make_context("verl-pte", [words[0]], resilient_parsing=True)
    subcommand = group.get_command(context, words[0])
    assert subcommand is not None, f"verl-pte {words[0]}: no such command"
    subcommand.make_context(words[0], [word for word in words[1:] if word != "..."], resilient_parsing="..." in words)


def test_options_named_in_sentences_exist() -> None:
    found = 0
    for page in PAGES:
        for words in re.findall(r"`verl-pte ([a-z-]+(?: [^`]+)?)`", (ROOT / page).read_text()):
            name, *options = words.split()
            command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            assert {option for option in options if option.startswith("--")} <= known, f"{page}: verl-pte {words}"
            found += 1
    assert found > 10


MAIN_PPO = [c for c in ALL if "verl.trainer.main_ppo" in c.text or c.text.startswith("... ")]


@pytest.mark.parametrize("command", MAIN_PPO, ids=_ids(MAIN_PPO))
def test_recipes_compose_with_the_overrides(command: Command) -> None:
    words = shlex.split(command.text)
    named = {words[i]: words[i + 1] for i, word in enumerate(words) if word in ("--config-dir", "--config-name")}
    assert named.get("--config-dir", "recipes") == "recipes"
    overrides = [word for word in words if "=" in word]
    assert overrides
    searched = "hydra.searchpath=[pkg://verl.trainer.config]"
    with initialize_config_dir(str(ROOT / "recipes"), version_base=None):
        config = compose(named.get("--config-name", "pte_grpo"), overrides=[searched, *overrides])
    assert config.actor_rollout_ref.rollout.name in ("pte", "pte_vllm")


def test_files_modules_and_settings_of_scripts_exist() -> None:
    seen = set()
    for command in ALL:
        words = shlex.split(command.text)
        script = next((word for word in words if word.endswith(".sh")), None)
        if script:
            text = (ROOT / script).read_text() + (ROOT / "examples" / "run_pte.sh").read_text()
            for word in words[: words.index("bash")]:
                assert f"${{{word.partition('=')[0]}:-" in text, f"{command.page}: {script} does not read {word}"
            seen.add("script")
        if words[:2] == ["python", "-m"]:
            assert find_spec(words[2]) is not None, words[2]
            paths = [word for word in words[3:] if word.startswith("tests/")]
            assert all((ROOT / path).is_file() for path in paths), paths
            seen |= {"module"} | ({"test"} if paths else set())
    assert seen == {"script", "module", "test"}


def test_extras_named_exist() -> None:
    import tomllib

    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = set()
    for page in PAGES:
        for listed in re.findall(r"pip install[^\n`]*?\[([\w,-]+)\]", (ROOT / page).read_text()):
            named |= set(listed.split(","))
    assert {"verl", "vllm", "eval"} <= named <= extras


# -- run here
# ------------------------------------------------------------------------------------------------------------

PLANS = sorted({c.text for c in ALL if c.text.startswith("verl-pte plan ")})


@pytest.mark.parametrize("text", PLANS)
def test_plans(text: str) -> None:
    run = CliRunner().invoke(app, shlex.split(text)[1:])
    assert run.exit_code == 0 and "learner" in run.output and "DOES NOT FIT" not in run.output, run.output


def test_quickstart_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a run, in whose place an untrained model and a random adapter are saved where it would put them."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "quickstart"))
    monkeypatch.chdir(tmp_path)
    import make_model
    from tiny import tiny_pte
    from transformers import AutoModelForCausalLM

    out = Path("outputs/quickstart")
    tokenizer = make_model.make_tokenizer()
    make_model.make_model(tokenizer, seed=0).save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    base = AutoModelForCausalLM.from_pretrained(out / "model")
    step = out / "checkpoints" / "global_step_20"
    tiny_pte(model=base, window=16, block_size=8).save_pretrained(step / "actor" / "pte_adapter")
    (out / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("20")
    for module in ("make_model", "task"):
        sys.modules.pop(module)

    page = [c.text for c in ALL if c.page == "docs/quickstart.md" and c.text.startswith("verl-pte ")]
    assert [text.split()[1] for text in page] == ["export", "generate"]
    for text in page:
        run = CliRunner().invoke(app, shlex.split(text)[1:])
        assert run.exit_code == 0, run.output
    assert "num_evictions=" in run.stderr and run.stdout
    assert (out / "adapter" / "adapter_config.json").is_file()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The repository's files, with this environment in the place of the one `make install` makes."""
    files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(files, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith(".verl_pte"):
            (tmp_path / ".venv" / path.name).symlink_to(path)
    (tmp_path / ".venv" / ".verl_pte-installed").touch()
    return tmp_path


def test_make_targets(clone: Path) -> None:
    """`make docs` regenerates what is committed and builds the site; `make format` formats."""

    def make(target: str) -> None:
        env = os.environ | {"PYTHONPATH": str(clone), "NO_MKDOCS_2_WARNING": "1"}
        run = subprocess.run(["make", target], cwd=clone, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr

    page, picture = clone / "docs" / "configuration.md", clone / "docs" / "images" / "window.svg"
    page.write_text("out of date")
    picture.unlink()
    make("docs")
    assert page.read_bytes() == (ROOT / "docs" / "configuration.md").read_bytes() and picture.is_file()
    assert (clone / "site" / "troubleshooting" / "index.html").is_file()

    untidy = clone / "tests" / "untidy.py"
    untidy.write_text("import os\nx = {  'a':1 }\n")
    make("format")
    assert untidy.read_text() == 'x = {"a": 1}\n'
