"""Page tokens: what was given comes back, anything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.errors import InvalidRequestError
from hotgraph_server.rpc.paging import decode_page_token, encode_page_token


@given(st.integers(-(2**63), 2**63), st.text(max_size=50))
def test_tokens_round_trip(number: int, name: str) -> None:
    """The place comes back as it was."""
    assert decode_page_token(encode_page_token((number, name)), (int, str)) == (number, name)


def test_no_token_is_the_first_page() -> None:
    """Empty means from the start."""
    assert decode_page_token("", (str,)) is None


@given(st.text(min_size=1, max_size=60))
def test_foreign_tokens_are_refused(token: str) -> None:
    """Nothing but InvalidRequestError comes of a token that is not ours."""
    with pytest.raises(InvalidRequestError):
        decode_page_token(token, (int, str))


@pytest.mark.parametrize("place", [(), (1,), ("a", 1), (1, "a", "b"), (True, "a")])
def test_tokens_of_another_list_are_refused(place: tuple[int | str, ...]) -> None:
    """The parts must be of the right kinds."""
    with pytest.raises(InvalidRequestError):
        decode_page_token(encode_page_token(place), (int, str))


def test_huge_tokens_are_refused_unread() -> None:
    """A token longer than ours ever are is not decoded."""
    with pytest.raises(InvalidRequestError):
        decode_page_token("W" * 100_000, (str,))
