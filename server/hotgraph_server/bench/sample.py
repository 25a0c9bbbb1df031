"""What was seen of one request, and what follows from it: TTFT, TPOT, gaps, end-to-end. It does not know who sent it.

Times are seconds since the start of the run, on one clock. The definitions are those of `bench/README.md`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

WRONG_LENGTH = "WRONG_LENGTH"
STREAM_LOST = "STREAM_LOST"


@dataclass(frozen=True, slots=True)
class ServerView:
    """What the server's Finished event told of the request. Durations in seconds, on the server's clock."""

    queue_seconds: float
    prefill_seconds: float
    time_to_first_token_seconds: float
    total_seconds: float
    num_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_graph_steps: int
    num_eager_steps: int
    num_preemptions: int


@dataclass(slots=True)
class Sample:
    """One request. `client` is the closed-loop client that sent it, 0 in an open loop.

    `token_times` has one entry for each token: tokens of one event share its time. `token_ids` is empty unless the
    sender was told to keep them. `error` is the reason of the failure, empty when the request went well.
    """

    index: int
    client: int
    num_prompt_tokens: int
    max_tokens: int
    scheduled: float
    sent: float = 0.0
    end: float = 0.0
    token_times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_events: int = 0
    error: str = ""
    error_message: str = ""
    server: ServerView | None = None

    @property
    def is_ok(self) -> bool:
        return not self.error

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_times)

    @property
    def lag(self) -> float:
        """How late the load generator itself was. Latencies include it."""
        return self.sent - self.scheduled

    @property
    def time_to_first_token(self) -> float | None:
        return self.token_times[0] - self.scheduled if self.token_times else None

    @property
    def time_per_output_token(self) -> float | None:
        """(last - first) / (tokens - 1); None with fewer than two tokens."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Each gap between two tokens; 0 between tokens of one event."""
        return [later - earlier for earlier, later in pairwise(self.token_times)]

    @property
    def end_to_end(self) -> float:
        return self.end - self.scheduled

    def fail(self, reason: str, message: str) -> None:
        """Marks it as failed. The first reason stays."""
        if not self.error:
            self.error, self.error_message = reason, message

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Sample:
        server = value["server"]
        return cls(**{**value, "server": None if server is None else ServerView(**server)})
