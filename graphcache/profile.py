"""Which keys were hot: enough for another process to capture them first. Plain data, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FORMAT = 1


@dataclass(frozen=True, slots=True)
class ProfileEntry(Generic[K]):
    """How hot one key was. `saved_seconds`: what a replay saves over an eager step; may be negative, 0 when unknown.

    `size_bytes`: what its graph held, 0 when it never was captured.
    """

    key: K
    num_hits: int
    num_misses: int
    saved_seconds: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Profile(Generic[K]):
    """Entries, most valuable first."""

    entries: tuple[ProfileEntry[K], ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "entries": [
                {
                    "key": str(entry.key),
                    "num_hits": entry.num_hits,
                    "num_misses": entry.num_misses,
                    "saved_seconds": entry.saved_seconds,
                    "size_bytes": entry.size_bytes,
                }
                for entry in self.entries
            ],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: object, parse: Callable[[str], K]) -> Profile[K]:
        """The inverse of `to_dict`; `parse` is the inverse of str(key). Raises ValueError, also when `parse` does."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"no profile of format {FORMAT}")
        entries = data.get("entries")
        if not isinstance(entries, list):
            raise ValueError("a profile has a list of entries")
        return cls(tuple(_parse_entry(entry, parse) for entry in entries))

    @classmethod
    def from_json(cls, text: str, parse: Callable[[str], K]) -> Profile[K]:
        """The inverse of `to_json`. Raises ValueError."""
        return cls.from_dict(json.loads(text), parse)


def _parse_entry(data: object, parse: Callable[[str], K]) -> ProfileEntry[K]:
    if not isinstance(data, dict):
        raise ValueError(f"a profile entry is an object, not {data!r}")
    key = data.get("key")
    if not isinstance(key, str):
        raise ValueError(f"a profile entry's key is a string, not {key!r}")
    saved_seconds = data.get("saved_seconds")
    if (
        isinstance(saved_seconds, bool)
        or not isinstance(saved_seconds, int | float)
        or not math.isfinite(saved_seconds)
    ):
        raise ValueError(f"saved_seconds of {key!r} is a finite number, not {saved_seconds!r}")
    return ProfileEntry(
        key=parse(key),
        num_hits=_parse_count(data, key, "num_hits"),
        num_misses=_parse_count(data, key, "num_misses"),
        saved_seconds=float(saved_seconds),
        size_bytes=_parse_count(data, key, "size_bytes"),
    )


def _parse_count(data: dict[str, Any], key: str, field: str) -> int:
    value = data.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{field} of {key!r} is an integer from 0, not {value!r}")
    return value
