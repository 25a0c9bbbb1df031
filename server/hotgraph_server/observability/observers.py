"""Several who want to hear of the same calls and requests, told one after the other."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence

from hotgraph_server.batch import StepOutput
from hotgraph_server.errors import HotgraphError
from hotgraph_server.request import FinishedEvent
from hotgraph_server.rpc.call import Call, CallObserver
from hotgraph_server.scheduler.observer import Observer
from hotgraph_server.scheduler.sequence import Sequence
from hotgraph_server.scheduler.ticket import Ticket


class CallObservers:
    """A CallObserver of many."""

    def __init__(self, observers: AnySequence[CallObserver]) -> None:
        self._observers = tuple(observers)

    def call_begun(self, call: Call) -> None:
        for observer in self._observers:
            observer.call_begun(call)

    def call_ended(self, call: Call) -> None:
        for observer in self._observers:
            observer.call_ended(call)


class Observers:
    """A scheduler's Observer of many."""

    def __init__(self, observers: AnySequence[Observer]) -> None:
        self._observers = tuple(observers)

    def step_done(self, sequences: AnySequence[Sequence], output: StepOutput, now: float) -> None:
        for observer in self._observers:
            observer.step_done(sequences, output, now)

    def request_ended(self, ticket: Ticket, end: FinishedEvent | HotgraphError, now: float) -> None:
        for observer in self._observers:
            observer.request_ended(ticket, end, now)
