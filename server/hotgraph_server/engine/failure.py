"""What callers are told when an engine is beyond use. The cause is in the log only."""

from __future__ import annotations

from hotgraph_server.errors import EngineFailedError

RETRY_AFTER_SECONDS = 5.0
"""By then the supervisor has started the daemon again."""


def engine_failed() -> EngineFailedError:
    """A new error, since each has its own traceback."""
    return EngineFailedError("the engine failed", retry_after_seconds=RETRY_AFTER_SECONDS)
