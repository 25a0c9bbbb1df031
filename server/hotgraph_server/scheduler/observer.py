"""Who wants to hear of steps and ends of requests, for counting them. The scheduler knows nothing of what is made of it."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from typing import Protocol

from hotgraph_server.batch import StepOutput
from hotgraph_server.errors import HotgraphError
from hotgraph_server.request import FinishedEvent
from hotgraph_server.scheduler.sequence import Sequence
from hotgraph_server.scheduler.ticket import Ticket


class Observer(Protocol):
    """Called on the event loop, in the way of the next step: both must be quick, and must not raise. Times are seconds on
    the scheduler's clock."""

    def step_done(self, sequences: AnySequence[Sequence], output: StepOutput, now: float) -> None:
        """A step was read; `output.token_ids` align with `sequences`, which have not taken their tokens yet."""
        ...

    def request_ended(self, ticket: Ticket, end: FinishedEvent | HotgraphError, now: float) -> None:
        """A request's last word is in its stream."""
        ...
