"""Text out of a stream of tokens: a character is given out once all of its bytes are there.

The text so far and the text to come are decoded together from the last piece on, because a tokenizer may decode a
token differently at the beginning (it drops the space before a word). Special tokens are left out.
"""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what decoding makes of half a character


class Detokenizer:
    """Decodes one response with a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._context, self._done = 0, 0  # ids before `_done` are given out; those from `_context` on are context

    def add(self, token_ids: Sequence[int], last: bool = False) -> str:
        """The text these tokens complete; with `last` also what stays incomplete."""
        self._ids.extend(token_ids)
        before = self._decode(self._ids[self._context : self._done])
        text = self._decode(self._ids[self._context :])
        if not last and text.endswith(_INCOMPLETE):
            return ""
        if len(text) <= len(before):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
