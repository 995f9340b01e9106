"""One response at a time, token by token, on the native engine: for a chat.

`Streamer` is what a chat needs of an engine; `NativeStreamer` has it of the native one, verl_pte/vllm/stream.py of
vLLM. The cache's rows are sized for the longest prompt so far, so a short talk with a model of many positions does not
pay for them. Left out: text (both speak in token ids), and more than one response at once (`RolloutEngine`).
"""

from collections.abc import Generator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from torch import nn

from verl_pte.engine.engine import RolloutEngine
from verl_pte.engine.sampling import SamplingParams
from verl_pte.peft import pte_config

_FEWEST_ROW_TOKENS = 256


class Piece(NamedTuple):
    """What a step added to a response."""

    token_ids: list[int]  # new ones
    held_tokens: int  # tokens in the cache of a layer now
    cache_limit: int | None  # most it may hold; None without a window
    num_evictions: int  # so far
    finish_reason: str | None = None  # set on the last piece, as is what follows
    peak_cache_tokens: int | None = None


class Streamer(Protocol):
    """Something that answers prompts in pieces."""

    def stream(self, prompt: list[int], sampling: SamplingParams) -> Generator[Piece, None, None]:
        """Generate; closing the iterator aborts. Raises ValueError if the prompt cannot be served.

        Stops at `max_tokens`, or where the model has no more positions.
        """


def fitted(sampling: SamplingParams, prompt_len: int, max_prompt_length: int, max_positions: int) -> SamplingParams:
    """`sampling` with no more tokens than the positions left. Raises ValueError for too long a prompt."""
    longest = min(max_prompt_length, max_positions - 1)
    if prompt_len > longest:
        raise ValueError(f"the prompt (with the history of the chat) has {prompt_len} tokens: at most {longest} fit")
    return replace(sampling, max_tokens=min(sampling.max_tokens, max_positions - prompt_len))


class NativeStreamer:
    """Streams from a `RolloutEngine` of one row.

    Args:
        model: see `RolloutEngine`; stays on its device and in its dtype.
        tokenizer: its end-of-sequence token ends a response.
        max_prompt_length: longest prompt in tokens.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_prompt_length: int) -> None:
        self.model, self.tokenizer, self.max_prompt_length = model, tokenizer, max_prompt_length
        self.max_positions = model.config.max_position_embeddings
        self.schedule = pte_config(model).schedule()
        self.engine: RolloutEngine | None = None

    def stream(self, prompt: list[int], sampling: SamplingParams) -> Generator[Piece, None, None]:
        """See `Streamer`."""
        sampling = fitted(sampling, len(prompt), self.max_prompt_length, self.max_positions)
        engine = self._engine_for(len(prompt), sampling.max_tokens)
        engine.add_request("response", prompt, sampling)
        limit, sent = self.schedule.cache_limit(len(prompt)), 0
        try:
            while engine.has_unfinished:
                finished = engine.step()
                now = finished[0] if finished else engine.running[0]
                assert engine.cache is not None
                yield Piece(
                    now.token_ids[sent:],
                    int(engine.cache.occupancy()[0]),
                    limit,
                    now.num_evictions,
                    *((finished[0].finish_reason, finished[0].peak_cache_tokens) if finished else ()),
                )
                sent = len(now.token_ids)
        finally:
            engine.abort()

    def _engine_for(self, prompt_len: int, max_tokens: int) -> RolloutEngine:
        engine = self.engine
        if engine is None or prompt_len > engine.max_prompt_length or max_tokens > engine.max_response_length:
            row = max(_FEWEST_ROW_TOKENS, 1 << (prompt_len - 1).bit_length())
            self.engine = None  # its memory is free before the next one's is taken
            self.engine = RolloutEngine(
                self.model,
                self.tokenizer,
                max_num_seqs=1,
                max_prompt_length=max(prompt_len, min(row, self.max_positions - max_tokens)),
                max_response_length=max_tokens,
                dtype=next(self.model.get_base_model().parameters()).dtype,
            )
        assert self.engine is not None
        return self.engine
