"""Tests of scheduler/stops.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.scheduler.stops import StopMatcher


def run(pieces: list[str], strings: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """All text a matcher lets through, and what it matched."""
    matcher = StopMatcher(strings, include_in_text=include)
    text = ""
    for piece in pieces:
        match = matcher.push(piece)
        text += match.text
        if match.stop_string is not None:
            return text, match.stop_string
    return text + matcher.flush(), None


def reference(text: str, strings: list[str]) -> tuple[str, str | None]:
    """The same, character by character, the plain way."""
    for end in range(1, len(text) + 1):
        found = [s for s in strings if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_text_passes_when_nothing_can_match() -> None:
    """Text that begins no stop string is not held back."""
    assert StopMatcher(["xyz"]).push("hello").text == "hello"


def test_what_may_become_a_stop_string_is_held_back_and_released() -> None:
    """The open end waits, and comes out when it turns out to be something else."""
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN").text == "the "
    assert matcher.push("TER").text == "ENTER"
    assert matcher.push("E").text == ""
    assert matcher.flush() == "E"


def test_the_match_is_cut_off_or_kept_as_asked() -> None:
    """Text ends before the stop string, or with it."""
    assert run(["say EN", "D now"], ["END"]) == ("say ", "END")
    assert run(["say EN", "D now"], ["END"], include=True) == ("say END", "END")


PIECES = st.lists(st.text("ab", max_size=5), max_size=8)
STRINGS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


@given(PIECES, STRINGS)
def test_the_result_does_not_depend_on_how_the_text_is_cut(pieces: list[str], strings: list[str]) -> None:
    """Any pieces give what the whole text gives, character by character."""
    assert run(pieces, strings) == reference("".join(pieces), strings)


@given(PIECES, STRINGS)
def test_no_more_is_held_back_than_must_be(pieces: list[str], strings: list[str]) -> None:
    """What is held back at any time begins some stop string, and is the longest such end."""
    matcher = StopMatcher(strings)
    sent = text = ""
    for piece in pieces:
        match = matcher.push(piece)
        if match.stop_string is not None:
            return
        sent += match.text
        text += piece
        held = text[len(sent) :]
        assert text.startswith(sent)
        assert not held or any(s.startswith(held) for s in strings)
        assert not any(
            s.startswith(text[-n:]) for s in strings for n in range(len(held) + 1, min(len(s), len(text) + 1))
        )
