"""A conversation with a model: its history, its prompts, and the numbers of an answer.

Knows nothing of terminals (terminal.py) and of engines no more than `Streamer`. All that was said becomes the next
prompt, through the tokenizer's chat template.
"""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from verl_pte.cli.detokenizer import Detokenizer
from verl_pte.engine.sampling import SamplingParams
from verl_pte.engine.stream import Piece, Streamer
from verl_pte.peft.saved import load_tokenizer


@dataclass
class Facts:
    """Numbers of an answer, as far as it has come."""

    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0  # from the first token to the last
    held_tokens: int = 0
    cache_limit: int | None = None
    num_evictions: int = 0
    peak_cache_tokens: int = 0
    finish_reason: str = "abort"
    _first: tuple[float, int] | None = field(default=None, repr=False)

    def take(self, piece: Piece) -> None:
        """Count a piece in."""
        self.tokens += len(piece.token_ids)
        now = time.perf_counter()
        if self._first is None:
            self._first = now, self.tokens
        self.seconds = now - self._first[0]
        self.held_tokens, self.cache_limit, self.num_evictions = (
            piece.held_tokens,
            piece.cache_limit,
            piece.num_evictions,
        )
        self.peak_cache_tokens = piece.peak_cache_tokens or max(self.peak_cache_tokens, piece.held_tokens)
        self.finish_reason = piece.finish_reason or self.finish_reason

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding; 0 until there are two pieces."""
        first = self._first[1] if self._first else 0
        return (self.tokens - first) / self.seconds if self.seconds else 0.0

    def line(self) -> str:
        """``key=value`` of all that is known at the end."""
        limit = "none" if self.cache_limit is None else self.cache_limit
        return (
            f"prompt_tokens={self.prompt_tokens} tokens={self.tokens} tokens_per_second={self.tokens_per_second:.1f} "
            f"num_evictions={self.num_evictions} peak_cache_tokens={self.peak_cache_tokens} cache_limit={limit} "
            f"finish_reason={self.finish_reason}"
        )


class Chat:
    """Turns of a user and a model.

    Attributes:
        messages: the conversation so far, as chat templates take it.
        facts: of the last answer, or of the one under way.
    """

    def __init__(self, streamer: Streamer, tokenizer: Any, sampling: SamplingParams) -> None:
        self.streamer, self.tokenizer, self.sampling = streamer, tokenizer, sampling
        self.messages: list[dict[str, str]] = []
        self.facts = Facts()

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to `text` in pieces of text, some of them empty.

        Closing the iterator stops the answer; what came until then is part of the conversation. `facts` is that
        answer's from now on. Raises ValueError at the first piece, leaving the conversation as it was, if the prompt
        cannot be served.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        self.facts = Facts(prompt_tokens=len(prompt))
        return self._answer(messages, prompt, self.facts)

    def _answer(self, messages: list[dict[str, str]], prompt: list[int], facts: Facts) -> Generator[str, None, None]:
        detokenizer, said = Detokenizer(self.tokenizer), ""
        try:
            with closing(self.streamer.stream(prompt, self.sampling)) as pieces:
                for piece in pieces:
                    facts.take(piece)
                    new = detokenizer.add(piece.token_ids, last=piece.finish_reason is not None)
                    said += new
                    yield new
        finally:
            if facts.tokens:
                self.messages = [*messages, {"role": "assistant", "content": said}]


def chat_tokenizer(model: str) -> Any:
    """The base model's tokenizer. Raises ValueError if there is none, or none for chats."""
    tokenizer = load_tokenizer(model)
    if tokenizer.chat_template is None:
        raise ValueError(f"model={model}: its tokenizer has no chat template; use an instruct model")
    return tokenizer
