"""Tokens to text as they come: whole UTF-8 characters only, the same text however the tokens were grouped."""

from __future__ import annotations

from collections.abc import Sequence

from hotgraph_server.text import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

MAX_HELD_TOKENS = 16
"""A character has at most four bytes, so a longer run that ends in no character is garbage and is let go as such."""


class Detokenizer:
    """Text of one completion, token by token.

    Some tokenizers join words differently at the start of a text than inside it, so new tokens are decoded together with
    the few before them and the difference is what they add (the window moves on whenever text came out). A token that ends
    inside a character adds nothing until the character is whole.
    """

    __slots__ = ("_ids", "_prefix_start", "_read_end", "_skip_special_tokens", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._prefix_start = 0
        self._read_end = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        self._ids.append(token_id)
        before, now = self._window()
        is_open = now.endswith(REPLACEMENT) and len(self._ids) - self._read_end < MAX_HELD_TOKENS
        if len(now) <= len(before) or is_open:
            return ""
        self._advance()
        return now[len(before) :]

    def flush(self) -> str:
        """What is left at the end; bytes that form no character read as U+FFFD."""
        before, now = self._window()
        self._advance()
        return now[len(before) :]

    def _window(self) -> tuple[str, str]:
        before = self._decode(self._ids[self._prefix_start : self._read_end])
        return before, self._decode(self._ids[self._prefix_start :])

    def _advance(self) -> None:
        # Only the window is needed from here on: the rest is dropped, so that cost does not grow with length.
        self._ids = self._ids[self._read_end :]
        self._prefix_start = 0
        self._read_end = len(self._ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens) if token_ids else ""
