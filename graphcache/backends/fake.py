"""A backend and a program for tests, which ship with the library: durations, bytes, failures and mismatches can be set."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable

from graphcache.clock import Clock, FakeClock, SystemClock
from graphcache.errors import CaptureError, GraphStateError
from graphcache.interface import NoTurns, Turns

GATE_DEADLINE_SECONDS = 30.0


class FakeCaptured:
    """Counts what is done with it, and refuses what must never be done."""

    def __init__(self, backend: FakeBackend, name: str, work: Callable[[], None], size_bytes: int) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.record_seconds = backend.record_seconds
        self.instantiate_seconds = backend.instantiate_seconds
        self.num_replays = 0
        self.num_destroys = 0
        self._backend = backend
        self._work = work

    def replay(self) -> None:
        """Runs the work. Raises GraphStateError after `destroy`."""
        if self.num_destroys:
            raise GraphStateError(f"{self.name} was replayed after it was destroyed")
        self.num_replays += 1
        self._backend.num_replays[self.name] += 1
        self._work()

    def destroy(self) -> None:
        """Raises GraphStateError the second time, or away from the thread that captured."""
        self.num_destroys += 1
        if self.num_destroys > 1:
            raise GraphStateError(f"{self.name} was destroyed twice")
        self._backend.on_destroy(self)


class FakeBackend:
    """Captures nothing, at settable cost. Attributes may be changed at any time and hold from the next capture on.

    Durations pass on the given clock: a FakeClock is advanced, with any other the thread sleeps. `gate`, when set to an
    event, holds every capture until the event is set. A capture named in `pool_growths` makes the pool larger by so many bytes,
    which count in its size and stay in the pool when it is destroyed.
    """

    name = "fake"

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        size_bytes: int = 1 << 20,
        record_seconds: float = 0.0,
        instantiate_seconds: float = 0.0,
        is_fixed_shape: bool = True,
        needs_verification: bool = True,
    ) -> None:
        self.clock: Clock = clock if clock is not None else SystemClock()
        self.is_fixed_shape = is_fixed_shape
        self.needs_verification = needs_verification
        self.size_bytes = size_bytes
        self.sizes: dict[str, int] = {}  # bytes by name, before `size_bytes`
        self.pool_growths: dict[str, int] = {}  # bytes by name
        self.pool_bytes = 0
        self.record_seconds = record_seconds
        self.instantiate_seconds = instantiate_seconds
        self.failures: dict[str, str] = {}  # failure text by name
        self.gate: threading.Event | None = None
        self.num_starts = 0
        self.num_closes = 0
        self.num_warm_ups = 0
        self.num_rehearsals = 0
        self.num_turns = 0
        self.num_steps: Counter[str] = Counter()  # that it was told of, before and after
        self.num_captures: Counter[str] = Counter()
        self.num_destroys: Counter[str] = Counter()
        self.num_replays: Counter[str] = Counter()
        self.live: list[FakeCaptured] = []  # captured and not destroyed
        self._thread: int | None = None
        self._turns: Turns = NoTurns()

    def start(self, turns: Turns) -> None:
        self.num_starts += 1
        self._thread = threading.get_ident()
        self._turns = turns

    def capture(self, name: str, work: Callable[[], None]) -> FakeCaptured:
        self._check_thread()
        if self.gate is not None and not self.gate.wait(GATE_DEADLINE_SECONDS):
            raise CaptureError("the gate of the fake backend stayed shut")
        spend(self.clock, self.record_seconds)
        if name in self.failures:
            raise CaptureError(self.failures[name])
        self._turns.wait()
        spend(self.clock, self.instantiate_seconds)
        growth_bytes = self.pool_growths.get(name, 0)
        self.pool_bytes += growth_bytes
        captured = FakeCaptured(self, name, work, self.sizes.get(name, self.size_bytes) + growth_bytes)
        self.num_captures[name] += 1
        self.live.append(captured)
        return captured

    def warm_up(self, work: Callable[[], None]) -> None:
        self._check_thread()
        self.num_warm_ups += 1
        work()

    def rehearse(self, work: Callable[[], None]) -> None:
        self._check_thread()
        self.num_rehearsals += 1
        work()

    def give_way(self, seconds: float = math.inf) -> None:
        self.num_turns += 1

    def before_step(self) -> None:
        self.num_steps["before"] += 1

    def after_step(self) -> None:
        self.num_steps["after"] += 1

    def close(self) -> None:
        self._check_thread()
        self.num_closes += 1
        self.pool_bytes = 0

    def on_destroy(self, captured: FakeCaptured) -> None:
        """Called by a capture that is being destroyed."""
        self._check_thread()
        self.num_destroys[captured.name] += 1
        self.live.remove(captured)

    def _check_thread(self) -> None:
        if self._thread is not None and self._thread != threading.get_ident():
            raise GraphStateError("the backend was called away from the capture thread")


class FakeProgram:
    """A program whose work counts its runs. Names in `mismatches` fail verification, those in `failures` binding.

    While `is_busy`, verification replays nothing and says that it cannot tell.
    """

    def __init__(self, clock: Clock | None = None, *, bind_seconds: float = 0.0, verify_seconds: float = 0.0) -> None:
        self.clock: Clock = clock if clock is not None else SystemClock()
        self.bind_seconds = bind_seconds
        self.verify_seconds = verify_seconds
        self.failures: dict[str, Exception] = {}
        self.mismatches: set[str] = set()
        self.is_busy = False
        self.num_runs: Counter[str] = Counter()

    def bind(self, key: Hashable) -> Callable[[], None]:
        name = str(key)
        if name in self.failures:
            raise self.failures[name]
        spend(self.clock, self.bind_seconds)

        def work() -> None:
            self.num_runs[name] += 1

        return work

    def verify(self, key: Hashable, replay: Callable[[], None]) -> bool | None:
        spend(self.clock, self.verify_seconds)
        if self.is_busy:
            return None
        replay()
        return str(key) not in self.mismatches


def spend(clock: Clock, seconds: float) -> None:
    """Lets `seconds` pass on the clock: advances a fake one, sleeps on any other."""
    if isinstance(clock, FakeClock):
        clock.advance(seconds)
    elif seconds > 0:
        time.sleep(seconds)
