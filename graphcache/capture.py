"""One capture from binding to verification, on the capture thread. It knows the program and the backend, not the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from graphcache.clock import Clock
from graphcache.errors import CaptureError, DeviceLostError
from graphcache.graph import Graph
from graphcache.interface import Backend, Captured, Program, Turns

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

log = logging.getLogger("graphcache")

MISMATCH = "verification found other results than the eager ones"


@dataclass(frozen=True, slots=True)
class Verification:
    """A program's yes. `is_replayed`: it replayed the graph itself, and need not be asked again."""

    seconds: float
    is_replayed: bool


class MismatchError(CaptureError):
    """A replay gave another result than the eager run."""


class Capturer(Generic[K]):
    """Runs the phases and turns whatever goes wrong into a CaptureError with a fixed text; the rest goes to the log.

    Only DeviceLostError passes as it is, from any phase.
    """

    def __init__(
        self,
        program: Program[K],
        backend: Backend,
        clock: Clock,
        turns: Turns,
    ) -> None:
        self._program = program
        self._backend = backend
        self._clock = clock
        self._turns = turns
        self._is_started = False

    def open(self) -> None:
        """Starts the backend unless it is. Raises CaptureError; the next call tries again."""
        if not self._is_started:
            self._guard("the backend did not start", lambda: self._backend.start(self._turns))
            self._is_started = True

    def close(self) -> None:
        """Closes the backend if it was started. What it raises is logged."""
        if self._is_started:
            self._is_started = False
            try:
                self._backend.close()
            except Exception:
                log.exception("the backend %s did not close", self._backend.name)

    def capture(self, key: K, name: str) -> Captured:
        """Binds and captures. Raises CaptureError, and then holds nothing."""
        self.open()
        work = self._guard(f"binding {name} failed", lambda: self._program.bind(key))
        self._turns.wait()
        return self._guard(f"capturing {name} failed", lambda: self._backend.capture(name, work))

    def verify(self, key: K, name: str, captured: Captured) -> Verification | None:
        """Has the program compare it with the eager result; None where no replay can differ.

        Raises MismatchError, or CaptureError when it cannot tell; `captured` is destroyed then.
        """
        if not self._backend.needs_verification:
            return None
        try:
            return self._compare(key, name, captured.replay)
        except BaseException:
            self.destroy(name, captured)
            raise

    def verify_again(self, graph: Graph[K]) -> Verification:
        """The same for a published graph, which the caller has acquired. Raises the same, and destroys nothing."""
        return self._compare(graph.key, graph.name, graph.replay)

    def _compare(self, key: K, name: str, replay: Callable[[], None]) -> Verification:
        self._turns.wait()
        started = self._clock.monotonic()
        verdict = self._guard(f"verifying {name} failed", lambda: self._verdict(key, replay))
        if verdict is False:
            raise MismatchError(MISMATCH)
        return Verification(self._clock.monotonic() - started, is_replayed=verdict is not None)

    def _verdict(self, key: K, replay: Callable[[], None]) -> bool | None:
        """As it was meant: a program may say it with a number of numpy's or torch's."""
        verdict = self._program.verify(key, replay)
        return None if verdict is None else bool(verdict)

    def destroy(self, name: str, captured: Captured) -> None:
        """What it raises is logged: there is nothing else to do."""
        try:
            captured.destroy()
        except Exception:
            log.exception("destroying %s failed", name)

    def _guard(self, failure: str, call: Callable[[], R]) -> R:
        try:
            return call()
        except DeviceLostError:
            raise
        except CaptureError as error:
            log.warning("%s: %s", failure, error)
            raise
        except Exception as error:
            log.exception("%s", failure)
            raise CaptureError(f"unexpected {type(error).__name__}; the log has it") from error
