"""Tests of scheduler/detokenizer.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.scheduler.detokenizer import MAX_HELD_TOKENS, Detokenizer
from hotgraph_server.text import ByteTokenizer


class SpacingTokenizer(ByteTokenizer):
    """Drops a leading space, as SentencePiece decoders do at the start of a text."""

    def decode(self, token_ids: object, *, skip_special_tokens: bool = True) -> str:
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens).removeprefix(" ")  # type: ignore[arg-type]


@given(st.text(max_size=40))
def test_the_pieces_add_up_to_the_text(text: str) -> None:
    """Token by token gives the whole text, and never a broken character."""
    detokenizer = Detokenizer(ByteTokenizer())
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    rest = detokenizer.flush()
    assert "".join(pieces) + rest == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_with_its_last() -> None:
    """Nothing is sent before the character is whole."""
    detokenizer = Detokenizer(ByteTokenizer())
    assert [detokenizer.push(byte) for byte in "€".encode()] == ["", "", "€"]


def test_an_open_character_at_the_end_reads_as_a_replacement() -> None:
    """Bytes that never became a character are not lost without a trace."""
    detokenizer = Detokenizer(ByteTokenizer())
    assert detokenizer.push("€".encode()[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_words_keep_their_spaces_inside_a_text() -> None:
    """A tokenizer that drops a leading space at the start does not drop it between tokens."""
    detokenizer = Detokenizer(SpacingTokenizer())
    text = "".join(detokenizer.push(byte) for byte in b" a b c") + detokenizer.flush()
    assert text == "a b c"


def test_garbage_is_not_held_forever() -> None:
    """A run of bytes that form no character is let go after a while, so cost and memory stay bounded."""
    detokenizer = Detokenizer(ByteTokenizer())
    pieces = [detokenizer.push(0x80) for _ in range(3 * MAX_HELD_TOKENS)]
    assert "".join(pieces).count("\ufffd") >= 2 * MAX_HELD_TOKENS
    assert len(detokenizer._ids) <= 2 * MAX_HELD_TOKENS


def test_special_tokens_are_left_out_or_kept() -> None:
    """skip_special_tokens decides whether the end-of-text token shows."""
    assert Detokenizer(ByteTokenizer()).push(256) == ""
    assert Detokenizer(ByteTokenizer(), skip_special_tokens=False).push(256) == "<eos>"
