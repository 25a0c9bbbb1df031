"""Bearer tokens: the file that lists them, and the search for the one that a caller shows. It knows no call.

One token a line: `ROLE NAME TOKEN`, or `ROLE NAME sha256:HEX` for who would rather not keep the token itself there. Blank
lines and lines that begin with # say nothing. A name may stand twice, so that a token can be changed without a gap.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from hotgraph_server.errors import SettingsError

MIN_TOKEN_CHARACTERS: Final = 20  # of what is written out; a hash tells nothing about it
MAX_TOKENS: Final = 1000  # each call is compared with all of them
_NAME: Final = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_PLAIN: Final = re.compile(r"[\x21-\x7e]+")
_HASH_PREFIX: Final = "sha256:"
_HASH: Final = re.compile(r"[0-9a-fA-F]{64}")


class Role(enum.IntEnum):
    """What a caller may do; each includes the ones before."""

    OPEN = 0  # what needs no credential
    USE = 1
    ADMIN = 2


ROLES: Final = {"use": Role.USE, "admin": Role.ADMIN}


@dataclass(frozen=True, slots=True)
class Token:
    """One that is accepted, as its SHA-256."""

    name: str
    role: Role
    digest: bytes = field(repr=False)


class Tokens:
    """All that are accepted. Immutable."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tuple(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and self._tokens == other._tokens

    def __hash__(self) -> int:
        return hash(self._tokens)

    def find(self, shown: str) -> Token | None:
        """The token that was shown. It takes as long for any: hashes are compared, in constant time, with every one."""
        digest = hashlib.sha256(shown.encode(errors="replace")).digest()
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found


def parse_tokens(text: str, origin: str) -> Tokens:
    """The tokens of a file's text. Raises SettingsError with `origin` and the line; never with what stands there."""
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            token = _parse(words)
            if any(token.digest == other.digest for other in tokens):
                raise ValueError("this token stands there already")
        except ValueError as error:
            raise SettingsError(f"{origin}, line {number}: {error}") from None
        tokens.append(token)
    if not tokens:
        raise SettingsError(f"{origin} lists no token")
    if len(tokens) > MAX_TOKENS:
        raise SettingsError(f"{origin} lists more than {MAX_TOKENS} tokens")
    return Tokens(tokens)


def _parse(words: list[str]) -> Token:
    if len(words) != 3:
        raise ValueError("wants a role, a name and a token")
    role, name, secret = words
    if role not in ROLES:
        raise ValueError("the role is use or admin")
    if not _NAME.fullmatch(name):
        raise ValueError("a name is 1 to 64 of [A-Za-z0-9._@-]")
    if secret.startswith(_HASH_PREFIX):
        if not _HASH.fullmatch(digest := secret.removeprefix(_HASH_PREFIX)):
            raise ValueError(f"{_HASH_PREFIX} is followed by 64 hexadecimal digits")
        return Token(name, ROLES[role], bytes.fromhex(digest))
    if not _PLAIN.fullmatch(secret) or len(secret) < MIN_TOKEN_CHARACTERS:
        raise ValueError(f"a token is {MIN_TOKEN_CHARACTERS} or more printable ASCII characters")
    return Token(name, ROLES[role], hashlib.sha256(secret.encode()).digest())
