"""The cache's errors. It knows no server: whoever embeds the library maps these to its own."""

from __future__ import annotations


class GraphCacheError(Exception):
    """The root."""


class CaptureError(GraphCacheError):
    """A capture failed. It costs speed, never an answer: the key backs off and its work goes on eagerly.

    `str(error)` is kept as the graph's failure and shown to operators, so backends use fixed texts.
    """


class DeviceLostError(GraphCacheError):
    """The device answers every call with an error and goes on doing so: only a new process helps.

    A backend raises it in place of CaptureError. The cache captures nothing from then on and keeps it as `GraphCache.lost`.
    """


class UnknownGraphError(GraphCacheError):
    """The cache has no entry of this name: never asked for, or forgotten."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no graph of this name: {name!r}")
        self.name = name


class GraphStateError(GraphCacheError):
    """The graph is not in a state that allows it."""


class CacheClosedError(GraphCacheError):
    """The cache was closed."""


class EventsGoneError(GraphCacheError):
    """The events asked for are not kept: too old, or of another life of the cache. Start again from a listing."""

    def __init__(self, *, after_sequence: int, oldest_sequence: int, last_sequence: int) -> None:
        super().__init__(
            f"no events right after {after_sequence} are kept: those kept are {oldest_sequence} to {last_sequence}"
        )
        self.after_sequence = after_sequence
        self.oldest_sequence = oldest_sequence
        self.last_sequence = last_sequence
