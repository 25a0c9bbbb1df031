"""Stop strings: text passes through, and whatever may become a stop string is held back until that is settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Text to send, and the stop string that was found, if any."""

    text: str
    stop_string: str | None = None


class StopMatcher:
    """Looks for the first of some strings in a text that comes in pieces. The result does not depend on the pieces."""

    __slots__ = ("_held", "_include_in_text", "_strings")

    def __init__(self, strings: Sequence[str], *, include_in_text: bool = False) -> None:
        self._strings = tuple(strings)
        self._include_in_text = include_in_text
        self._held = ""

    def push(self, text: str) -> StopMatch:
        """Text that may be sent now. With a match nothing may be pushed any more."""
        if not self._strings:
            return StopMatch(text)
        buffer = self._held + text
        found = [
            (start + len(string), start, string) for string in self._strings if (start := buffer.find(string)) >= 0
        ]
        if found:
            # The one that is complete first wins, of those that end together the longest: the same however text is cut.
            end, start, string = min(found)
            self._held = ""
            return StopMatch(buffer[: end if self._include_in_text else start], string)
        keep = self._longest_open(buffer)
        self._held = buffer[len(buffer) - keep :]
        return StopMatch(buffer[: len(buffer) - keep])

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _longest_open(self, buffer: str) -> int:
        """Length of the longest end of the buffer that begins a stop string."""
        longest = min(len(buffer), max(map(len, self._strings)) - 1)
        for length in range(longest, 0, -1):
            tail = buffer[len(buffer) - length :]
            if any(string.startswith(tail) for string in self._strings):
                return length
        return 0
