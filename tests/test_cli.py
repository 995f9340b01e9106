"""The command line: what it prints, where, and how it ends. The server itself is tested in tests/vllm/test_serve.py."""

import contextlib
import errno
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_model import ENVIRONMENT, PTE, ChatModel, write_chat_model
from tiny import tiny_pte
from typer.testing import CliRunner

from verl_pte import PTEConfig, attach
from verl_pte.cli import app

COMMAND = Path(sys.executable).with_name("verl-pte")
NUM_TOKENS = 150


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> ChatModel:
    return write_chat_model(tmp_path_factory.mktemp("cli"))


def arguments(chat_model: ChatModel, *more: str) -> list[str]:
    """Of a greedy, exact generate."""
    named = ["--model", str(chat_model.base), "--adapter", str(chat_model.adapter), "--max-tokens", str(NUM_TOKENS)]
    return ["generate", *named, "--temperature", "0", "--dtype", "float32", *more]


# -- help and errors
# -----------------------------------------------------------------------------------------------------


def test_help_needs_neither_torch_nor_vllm_nor_verl() -> None:
    code = (
        "import sys\n"
        "heavy = 'torch', 'transformers', 'peft', 'numpy', 'pyarrow', 'datasets', 'vllm', 'verl', 'ray'\n"
        "sys.modules |= dict.fromkeys(heavy)\n"
        "from verl_pte.cli import app\n"
        "app(sys.argv[1:])"
    )
    shown = {}
    for command in ("", "serve", "generate", "warm-start", "prepare-data", "evaluate", "plan", "export", "doctor"):
        asked = [sys.executable, "-c", code, *filter(None, [command]), "--help"]
        done = subprocess.run(asked, capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"})
        assert done.returncode == 0, done.stderr
        shown[command] = done.stdout
    assert "serve" in shown[""] and "generate" in shown[""]
    assert "kv_transfer_params" in shown["serve"] and "peak_cache_tokens" in shown["serve"]
    assert "127.0.0.1" in shown["serve"]
    assert "never evicted" in shown["generate"]
    assert "pass@k" in shown["evaluate"] and "--baseline" in shown["evaluate"]
    assert "without labels" in shown["warm-start"] and "--pte" in shown["warm-start"]
    assert "olympiadbench" in shown["prepare-data"] and "{problem}" in shown["prepare-data"]
    assert "micro" in shown["plan"] and "Nothing is loaded" in shown["plan"]
    assert "--json" in shown["doctor"] and "Exit status 0" in shown["doctor"]
    assert "global_step_N" in shown["export"] and "model card" in shown["export"]


def refusals(chat_model: ChatModel, folder: Path, busy_port: int) -> list[tuple[list[str], int, str, bool]]:
    """(arguments, exit status, part of the message, whether vLLM may be loaded for it)."""
    base, adapter = ["--model", str(chat_model.base)], ["--adapter", str(chat_model.adapter)]
    serve, generate = ["serve", *base], ["generate", *base]
    say = ["--prompt", "x"]
    return [
        (["serve", "--model", str(folder / "nowhere"), *adapter], 2, "nowhere: no such directory", False),
        (["serve", "--model", str(folder), *adapter], 2, "has no config.json", False),
        (["serve", "--model", "nobody/nothing", *adapter], 2, "nobody/nothing: no such directory, and the hub", False),
        ([*serve, "--adapter", str(folder / "nowhere")], 2, "nowhere: no such directory", False),
        ([*serve, "--adapter", str(folder)], 2, "has no adapter_config.json", False),
        ([*serve, "--adapter", str(folder / "lora")], 2, "holds a LORA adapter, not a PTE one", False),
        ([*serve, "--adapter", str(folder / "small_blocks")], 2, "block_size=4: must be a multiple of 16", False),
        (serve, 2, "--adapter DIR is missing", False),
        ([*serve, "--window", "40"], 2, "window=40: must be a multiple of block_size=16", False),
        ([*serve, *adapter, "--port", "0"], 2, "--port", False),
        ([*serve, *adapter, "--enable-lora"], 2, "No such option", False),
        ([*generate, "--adapter", str(folder / "nowhere"), *say], 2, "nowhere: no such directory", False),
        ([*generate, *adapter, *say, "--", "--enforce-eager"], 2, "vLLM's options need --engine vllm", False),
        ([*generate, *adapter, *say, "--top-p", "0"], 2, "top_p=0.0: must be in (0, 1]", False),
        ([*generate, *adapter, *say, "--dtype", "int8"], 2, "dtype=int8: must be one of", False),
        ([*generate, *adapter, "--prompt", " "], 2, "the prompt is empty", False),
        ([*generate, *adapter, "--prompt", "x" * 2000], 2, "at most 1023 fit", False),
        ([*generate, *adapter, *say, "--max-prompt-length", "8"], 2, "at most 8 fit", False),
        (["generate", "--model", str(folder / "speechless"), "--window", "16", *say], 2, "no chat template", False),
        (["VLLM=None", *serve, *adapter], 1, "there is no vLLM", False),
        (["VLLM=0.26.0", *serve, *adapter], 1, "found vllm 0.26.0", False),
        (["VLLM=0.26.0", *generate, *adapter, *say, "--engine", "vllm"], 1, "found vllm 0.26.0", False),
        ([*serve, *adapter, "--", "--enforce-eagre"], 2, "unrecognized arguments: --enforce-eagre", True),
        ([*serve, *adapter, "--", "--block-size", "32"], 2, "block_size=32: must be 16 with PTE", True),
        ([*serve, *adapter, "--", '--hf-overrides={"architectures": ["X"]}'], 2, "architectures=['X'] would", True),
        ([*serve, *adapter, "--", "--enable-lora"], 2, "enable_lora=True: must be False with PTE", True),
        ([*serve, *adapter, "--max-model-len", "99999"], 2, "max_model_len (99999) is greater", True),
        ([*serve, *adapter, "--port", str(busy_port)], 2, f"port={busy_port}: {os.strerror(errno.EADDRINUSE)}", True),
        (
            [*generate, *adapter, *say, "--engine", "vllm", "--", "--tensor-parallel-size=2"],
            2,
            "tensor_parallel_size, data_parallel_size: must be 1",
            True,
        ),
    ]


# Runs the command lines it is given, one after the other, in one process.
RUN_ALL = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
from verl_pte.cli import app
from verl_pte.vllm import version
installed, found = version.installed_version, []
for args in json.loads(Path(sys.argv[1]).read_text()):
    version.installed_version = installed
    if args[0].startswith("VLLM="):
        value = args.pop(0).removeprefix("VLLM=")
        version.installed_version = lambda: None if value == "None" else value
    result = CliRunner().invoke(app, args)
    found.append([result.exit_code, result.output, repr(result.exception), "vllm" in sys.modules])
Path(sys.argv[2]).write_text(json.dumps(found))
"""


def test_bad_input_ends_early_with_a_line(chat_model: ChatModel, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from tiny import tiny_model

    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    tiny_pte(block_size=4).save_pretrained(tmp_path / "small_blocks")
    tokenizer = chat_model.tokenizer.__class__.from_pretrained(chat_model.base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "speechless")
    chat_model.model.config.save_pretrained(tmp_path / "speechless")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        cases = refusals(chat_model, tmp_path, busy.getsockname()[1])
        (tmp_path / "cases.json").write_text(json.dumps([case[0] for case in cases]))
        process = subprocess.Popen(
            [sys.executable, "-c", RUN_ALL, tmp_path / "cases.json", tmp_path / "found.json"],
            # vLLM's log would otherwise go to the stream of the first command that loads it, which is closed after it.
            env=os.environ | ENVIRONMENT | {"COLUMNS": "300", "VLLM_LOGGING_STREAM": "ext://sys.__stderr__"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=150)  # a server that starts after all does not end
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for (args, status_code, message, may_load), (code, output, exception, loaded) in zip(cases, found, strict=True):
        assert code == status_code, (args, code, output, exception)
        assert message in output, (args, output)
        assert "Traceback" not in output and exception.startswith("SystemExit"), (args, exception)
        assert may_load or not loaded, f"{args}: vLLM was loaded before the mistake was seen"


# -- one answer
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(chat_model: ChatModel) -> tuple[str, str]:
    """The text and the numbers of the greedy answer to "Hello there"."""
    output = chat_model.greedy("Hello there", num_tokens=NUM_TOKENS)
    facts = f"num_evictions={output.num_evictions} peak_cache_tokens={output.peak_cache_tokens} cache_limit=64"
    assert output.num_evictions > 5
    return chat_model.text(output), f"{facts} finish_reason=length"


def test_vllm_answers_through_pipes(chat_model: ChatModel, expected: tuple[str, str]) -> None:
    """vLLM's log, chatty or not, stays out of standard output; its own cache size would be most of the machine."""
    asked = [COMMAND, *arguments(chat_model, "--engine", "vllm", "--", "--enforce-eager")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    environment |= {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(asked, input="Hello there", capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == expected[0] + "\n"
    assert expected[1] in done.stderr


def test_native_answers_through_pipes(chat_model: ChatModel, expected: tuple[str, str]) -> None:
    for more, piped in ((["--prompt", "Hello there"], None), ([], "Hello there")):
        result = CliRunner().invoke(app, arguments(chat_model, *more), input=piped)
        assert result.exit_code == 0, result.output
        assert result.stdout == expected[0] + "\n"
        assert (
            re.fullmatch(rf"prompt_tokens=30 tokens={NUM_TOKENS} tokens_per_second=[\d.]+ (.*)\n", result.stderr)[1]
            == (expected[1])
        )


def generated(*args: str) -> tuple[str, str]:
    """Standard output and error of a generate in this process."""
    result = CliRunner().invoke(app, ["generate", "--prompt", "Hello there", "--dtype", "float32", *args])
    assert result.exit_code == 0, result.output
    return result.stdout.rstrip("\n"), result.stderr


def test_base_model_under_a_window(chat_model: ChatModel) -> None:
    """Without an adapter it is the untouched base: what an adapter of zeros gives."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(chat_model.base)
    untouched = ChatModel(chat_model.base, Path(), attach(base, PTEConfig(**PTE)), chat_model.tokenizer)
    output = untouched.greedy("Hello there", num_tokens=NUM_TOKENS)
    greedy = ["--model", str(chat_model.base), "--temperature", "0", "--max-tokens", str(NUM_TOKENS)]
    text, facts = generated(*greedy, "--window", "32")
    assert text == untouched.text(output) != chat_model.text(chat_model.greedy("Hello there", num_tokens=NUM_TOKENS))
    assert f"num_evictions={output.num_evictions} peak_cache_tokens=64 cache_limit=64" in facts
    full, facts = generated(*greedy, "--window", "0")
    assert full != text
    assert f"num_evictions=0 peak_cache_tokens={30 + NUM_TOKENS - 1} cache_limit=none" in facts


def test_window_replaces_the_adapters(chat_model: ChatModel) -> None:
    _, facts = generated(*arguments(chat_model)[1:], "--window", "64")
    assert "cache_limit=96" in facts and "peak_cache_tokens=96" in facts


def test_seed_makes_sampling_repeatable(chat_model: ChatModel) -> None:
    sampled = ["--model", str(chat_model.base), "--adapter", str(chat_model.adapter), "--max-tokens", "40", "--seed"]
    assert generated(*sampled, "1")[0] == generated(*sampled, "1")[0] != generated(*sampled, "2")[0]
    assert generated(*sampled, "1", "--temperature", "0")[0] == generated(*sampled, "1", "--top-p", "1e-6")[0]


# -- a conversation in a terminal
# ----------------------------------------------------------------------------------------


class Terminal:
    """A program on a pseudo-terminal of 80 columns."""

    def __init__(self, args: list[str]) -> None:
        self.shown = ""
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", COLUMNS="80", LINES="24")
            os.execv(COMMAND, [str(COMMAND), *args])

    def wait_for(self, pattern: str, seconds: float = 240) -> str:
        """Read until `pattern` has been shown; returns what was shown up to then, and forgets it."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown, flags=re.S)):
            assert time.monotonic() < deadline, f"{pattern!r} was not shown: {self.shown[-3000:]}"
            assert self._read(), f"it ended before {pattern!r}: {self.shown[-3000:]}"
        seen, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return seen

    def type(self, keys: str) -> None:
        time.sleep(0.3)  # as people do: readline may miss a signal that comes with its prompt
        os.write(self.terminal, keys.encode())

    def end(self) -> int:
        """The exit status, once it has ended by itself."""
        while self._read(10):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """End it and what it started, if anything still runs."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.terminal)

    def _read(self, seconds: float = 1) -> bool:
        if not select.select([self.terminal], [], [], seconds)[0]:
            return True
        try:
            new = os.read(self.terminal, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", new.decode(errors="replace"))
        return bool(new)


@pytest.fixture(scope="module")
def patient_model(tmp_path_factory) -> ChatModel:
    """Has positions for an answer that takes half a minute: nobody is too slow to interrupt it."""
    return write_chat_model(tmp_path_factory.mktemp("patient"), max_positions=32768)


@pytest.fixture(params=["native", "vllm"])
def terminal(request, patient_model: ChatModel, monkeypatch) -> Iterator[Terminal]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    lengths = ["--max-tokens", "20000", "--max-prompt-length", "12000"]
    options = [] if request.param == "native" else ["--", "--enforce-eager"]
    started = Terminal([*arguments(patient_model, "--engine", request.param), *lengths, *options])
    yield started
    started.kill()


def test_conversation(terminal: Terminal, patient_model: ChatModel) -> None:
    def say(text: str, limit: int, facts: str) -> tuple[str, str]:
        """Say something, and stop the answer after some evictions: the numbers, and all that was shown."""
        terminal.type(text + "\n")
        shown = terminal.wait_for(rf"/{limit} tokens  [1-9]\d* evictions  \d+ generated")
        os.write(terminal.terminal, b"\x03")
        shown += terminal.wait_for("finish_reason=abort")
        assert max(int(number) for number in re.findall(rf"cache \S+ (\d+)/{limit} tokens", shown)) <= limit
        line = " ".join(shown[shown.rindex("prompt_tokens=") :].split())
        assert re.fullmatch(rf"{facts} tokens=\d+ .* cache_limit={limit} finish_reason=abort", line)
        terminal.wait_for("> ")
        return line, shown

    def limit(*texts: str) -> int:
        return patient_model.model.peft_config["default"].schedule().cache_limit(len(patient_model.prompt(*texts)))

    terminal.wait_for("Ctrl-D ends it.*> ")
    line, shown = say("Hello there", 64, "prompt_tokens=30")
    count = int(re.search(r" tokens=(\d+)", line)[1])
    assert 64 - 30 <= count < 20000  # something was evicted, so the cache was full
    said = patient_model.text(patient_model.greedy("Hello there", num_tokens=count))
    lines = [said[start : start + 80] for start in range(0, count, 80)]  # as wide as the terminal
    assert all(text in shown for text in lines)
    assert f"{lines[-1]}\r\nprompt_tokens=" in shown, "the line under way stays when the answer is stopped"

    history = ("Hello there", said, "Again")  # what was said until then is part of the next prompt
    say("Again", limit(*history), f"prompt_tokens={len(patient_model.prompt(*history))}")
    terminal.type("\x03")
    terminal.wait_for("exit or Ctrl-D ends the conversation.*> ")
    terminal.type("/clear\n")
    terminal.wait_for("forgotten.*> ")
    say("Hello there", 64, "prompt_tokens=30")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.shown
