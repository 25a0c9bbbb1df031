"""Page tokens: opaque to callers, a place in an order to us."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence

from hotgraph_server.errors import InvalidRequestError, Violation

MAX_TOKEN_CHARACTERS = 1024


def encode_page_token(place: Sequence[int | str]) -> str:
    """The sort key of the last item of a page."""
    return base64.urlsafe_b64encode(json.dumps(list(place)).encode()).decode()


def decode_page_token(token: str, kinds: Sequence[type]) -> tuple[int | str, ...] | None:
    """The sort key to go on after, None for the first page. Raises InvalidRequestError for what is no token of ours."""
    if not token:
        return None
    wrong = InvalidRequestError([Violation("page_token", "is none that this server gave")])
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise wrong
    try:
        place = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        raise wrong from None
    if not isinstance(place, list) or [type(part) for part in place] != list(kinds):
        raise wrong
    return tuple(place)
