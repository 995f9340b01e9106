"""The parts of a chat without an engine: history, interruption, whole characters, what a terminal is shown."""

import io
import os
import signal
import time
from collections.abc import Iterator

import pytest
from chat_model import ChatModel, write_chat_model
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from verl_pte import SamplingParams
from verl_pte.cli.chat import Chat, Facts
from verl_pte.cli.detokenizer import Detokenizer
from verl_pte.cli.display import AnswerDisplay, status
from verl_pte.cli.terminal import answer_once, converse
from verl_pte.engine.stream import Piece


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> ChatModel:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


class Echo:
    """A streamer that says the same every time, and notes what it was asked."""

    def __init__(self, *pieces: list[int], error: Exception | None = None) -> None:
        self.pieces, self.error = pieces, error
        self.prompts: list[list[int]] = []
        self.closed = 0

    def stream(self, prompt: list[int], sampling: SamplingParams) -> Iterator[Piece]:
        if self.error is not None:
            raise self.error
        self.prompts.append(prompt)
        try:
            for i, ids in enumerate(self.pieces):
                last = i + 1 == len(self.pieces)
                yield Piece(ids, 20 + i, 32, i // 2, *(("stop", 29) if last else ()))
        finally:
            self.closed += 1


def test_history_becomes_the_prompt(chat_model: ChatModel) -> None:
    ids = chat_model.tokenizer.encode("ab")
    echo = Echo(ids[:1], ids[1:], [chat_model.tokenizer.eos_token_id])
    chat = Chat(echo, chat_model.tokenizer, SamplingParams())
    assert "".join(chat.answer("One")) == "ab"
    assert (chat.facts.tokens, chat.facts.peak_cache_tokens, chat.facts.finish_reason) == (3, 29, "stop")
    assert "".join(chat.answer("Two")) == "ab"
    assert echo.prompts == [chat_model.prompt("One"), chat_model.prompt("One", "ab", "Two")]
    assert echo.closed == 2


def test_stopped_answer_stays_in_the_history(chat_model: ChatModel) -> None:
    echo = Echo(*[[i] for i in chat_model.tokenizer.encode("abcdef")])
    chat = Chat(echo, chat_model.tokenizer, SamplingParams())
    answer = chat.answer("One")
    assert [next(answer), next(answer)] == ["a", "b"]
    answer.close()
    assert echo.closed == 1
    assert chat.messages[-1] == {"role": "assistant", "content": "ab"}
    assert (chat.facts.tokens, chat.facts.peak_cache_tokens, chat.facts.finish_reason) == (2, 21, "abort")


@pytest.mark.parametrize("word", ["exit", " quit ", "/exit"])
def test_a_word_ends_the_conversation(chat_model: ChatModel, word: str, monkeypatch, capsys) -> None:
    lines = iter(["", "One", word, "Two"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    echo = Echo(chat_model.tokenizer.encode("ab"))
    converse(Chat(echo, chat_model.tokenizer, SamplingParams()))
    assert echo.prompts == [chat_model.prompt("One")]
    assert "ab" in capsys.readouterr().out.splitlines()


def test_conversation_goes_on_after_an_error(chat_model: ChatModel, monkeypatch, capsys) -> None:
    lines = iter(["One", "Two", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    converse(Chat(Echo(error=ValueError("too long")), chat_model.tokenizer, SamplingParams()))
    assert capsys.readouterr().out.splitlines().count("Error: too long") == 2


def test_ctrl_c_ends_an_answer_through_pipes(chat_model: ChatModel, capsys) -> None:
    class Interrupted(Echo):
        def stream(self, prompt: list[int], sampling: SamplingParams) -> Iterator[Piece]:
            for i, piece in enumerate(super().stream(prompt, sampling)):
                if i == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                yield piece

    chat = Chat(
        Interrupted(*[[i] for i in chat_model.tokenizer.encode("abcdef")]), chat_model.tokenizer, SamplingParams()
    )
    try:
        finished = answer_once(chat, "One")
    except KeyboardInterrupt:  # would end pytest
        pytest.fail("the signal was not caught")
    assert not finished
    out, err = capsys.readouterr()
    assert out == "abc\n" and err.rstrip().endswith("finish_reason=abort")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_refused_prompt_leaves_the_history_alone(chat_model: ChatModel) -> None:
    chat = Chat(Echo(error=ValueError("too long")), chat_model.tokenizer, SamplingParams())
    with pytest.raises(ValueError, match="too long"):
        next(chat.answer("One"))
    assert chat.messages == []


@given(
    text=st.text(max_size=40).filter(lambda text: not text.endswith("\ufffd")),
    cuts=st.lists(st.integers(0, 200)),
    stray=st.binary(max_size=3),
)
def test_detokenizer_gives_whole_characters(text: str, cuts: list[int], stray: bytes) -> None:
    class Bytes:
        """A byte-level tokenizer; 256 is a special token."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return bytes(i for i in ids if i < 256).decode(errors="replace")

    tokenizer, ids = Bytes(), [*text.encode(), 256, *stray]
    bounds = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(ids[a:b], last=b == len(ids)) for a, b in zip(bounds, bounds[1:] or bounds, strict=False)]
    assert "".join(pieces) == tokenizer.decode(ids, True)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_detokenizer_keeps_the_space_between_words() -> None:
    class Words:
        """Drops the space before the first word it decodes, as sentencepiece does."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return " ".join(f"w{i}" for i in ids)

    detokenizer = Detokenizer(Words())
    assert [detokenizer.add([i]) for i in range(4)] == ["w0", " w1", " w2", " w3"]


def displayed(text: str, pieces: int, width: int = 40) -> list[str]:
    """The lines that stay of an answer given in pieces: no terminal, so nothing is redrawn."""
    console = Console(file=io.StringIO(), width=width)
    with AnswerDisplay(console, Facts()) as display:
        for i in range(0, len(text), pieces):
            display.add(text[i : i + pieces])
    return console.file.getvalue().splitlines()


def test_display_shows_all_of_the_text_in_lines_that_fit() -> None:
    words = " ".join(f"word{i}" for i in range(60))
    for text in (words, "x" * 200, "\u6f22" * 50, f"{words}\n{words}", "one\ntwo\n\nthree"):
        for pieces in (1, 7, 1000):
            lines = displayed(text, pieces)
            assert "".join("".join(lines).split()) == "".join(text.split())
            assert max(map(cell_len, lines)) <= 40
    assert displayed(words, 3) == displayed(words, 1000)
    assert set(" ".join(displayed(words, 3)).split()) == set(words.split())  # no word is broken
    assert displayed("one\ntwo\n\nthree", 1) == ["one", "two", "", "three"]


def test_display_keeps_control_characters_from_the_terminal() -> None:
    (line,) = displayed("safe\x1b]0;title\x07\x1b[2Jtext\r\x08", 3)
    assert line == "safe\ufffd]0;title\ufffd\ufffd[2Jtext\ufffd\ufffd"


def test_status_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), width=200)
    long_ago = (time.perf_counter() - 100, 1)
    console.print(status(Facts(1, 12345, 100.0, 9216, 9216, 123, _first=long_ago)))
    (line,) = console.file.getvalue().splitlines()
    assert "9216/9216 tokens  123 evictions  12345 generated  123.4/s" in line
    assert cell_len(line.rstrip()) <= 80


def test_status_without_a_window_has_no_bar() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(status(Facts(tokens=5, held_tokens=35)))
    console.print(status(Facts(prompt_tokens=9)))
    assert console.file.getvalue().split("\n")[:2] == [
        "cache 35 tokens, no limit  0 evictions  5 generated  0.0/s",
        "reading 9 tokens",
    ]
