"""Times and durations on the wire."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

_NANOS = 1_000_000_000


def to_duration(seconds: float) -> Duration:
    """To the nearest nanosecond; both parts of a negative one are negative."""
    sign = -1 if seconds < 0 else 1
    whole, nanos = divmod(round(abs(seconds) * _NANOS), _NANOS)
    return Duration(seconds=sign * whole, nanos=sign * nanos)


def from_duration(duration: Duration) -> float:
    """Seconds."""
    return duration.seconds + duration.nanos / _NANOS


def to_timestamp(epoch_seconds: float) -> Timestamp:
    """From seconds since the epoch."""
    seconds, nanos = divmod(round(epoch_seconds * _NANOS), _NANOS)
    return Timestamp(seconds=seconds, nanos=nanos)
