"""The file of tokens: what is taken, what is refused, and that neither errors nor time tell a secret."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.errors import SettingsError
from hotgraph_server.rpc import tokens as module
from hotgraph_server.rpc.tokens import MAX_TOKENS, Role, parse_tokens


def test_both_ways_to_write_a_token() -> None:
    """A token in the clear and one as its hash are found with name and role; a name may stand twice; others are not found."""
    first, second, third = (secrets.token_urlsafe() for _ in range(3))
    hashed = hashlib.sha256(second.encode()).hexdigest().upper()
    text = f"# who\n\nuse alice {first}\n  admin  root@x  sha256:{hashed} \nuse alice {third}\n"
    tokens = parse_tokens(text, "f")
    found = [tokens.find(token) for token in (first, second, third)]
    assert [(token.name, token.role) for token in found if token is not None] == [
        ("alice", Role.USE),
        ("root@x", Role.ADMIN),
        ("alice", Role.USE),
    ]
    for wrong in ("", first[:-1], first + "x", f"sha256:{hashed}", hashed, "\udc80", secrets.token_urlsafe()):
        assert tokens.find(wrong) is None
    assert first not in repr(found)
    assert hashed.lower() not in repr(found).lower()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("use alice", "a role, a name and a token"),
        ("use alice SECRET-SECRET-SECRET more", "a role, a name and a token"),
        ("root alice SECRET-SECRET-SECRET", "use or admin"),
        ("use al/ice SECRET-SECRET-SECRET", "a name is"),
        ("use alice SECRET", "20 or more"),
        ("use alice SECRET-SECRET-SECRÉT-X", "printable ASCII"),
        ("use alice sha256:" + "0" * 63, "64 hexadecimal"),
        ("use bob SECRET-SECRET-SECRET-1", "already"),
    ],
)
def test_bad_line_is_named_and_not_quoted(line: str, words: str) -> None:
    """The error has file, line and reason, and nothing of the secret."""
    with pytest.raises(SettingsError) as caught:
        parse_tokens(f"admin alice SECRET-SECRET-SECRET-1\n{line}\n", "/etc/t")
    assert caught.value.message.startswith("/etc/t, line 2: ")
    assert words in caught.value.message
    assert "SECR" not in caught.value.message
    assert "0" * 63 not in caught.value.message


@given(st.text())
def test_any_text_is_tokens_or_an_error(text: str) -> None:
    """Nothing but SettingsError comes out, and what is taken is not empty."""
    with contextlib.suppress(SettingsError):
        assert len(parse_tokens(text, "f")) > 0


def test_too_many_and_none() -> None:
    """An empty file would let nobody in, and each call is compared with every token: both are refused."""
    with pytest.raises(SettingsError, match="lists no token"):
        parse_tokens("# none\n", "f")
    with pytest.raises(SettingsError, match="more than"):
        parse_tokens("".join(f"use n {index:020}\n" for index in range(MAX_TOKENS + 1)), "f")


def test_every_token_is_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the first, the last and no token alike each hash is compared by compare_digest, once."""
    tokens = parse_tokens("".join(f"use n{index} {index:020}\n" for index in range(7)), "f")
    lengths: list[tuple[int, int]] = []

    def counting(a: bytes, b: bytes) -> bool:
        lengths.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(module, "hmac", type("Counting", (), {"compare_digest": staticmethod(counting)}))
    for shown, is_there in ((f"{0:020}", True), (f"{6:020}", True), ("x", False), ("x" * 5000, False)):
        lengths.clear()
        assert (tokens.find(shown) is not None) is is_there
        assert lengths == [(32, 32)] * 7
