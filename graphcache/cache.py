"""The cache as its users see it. What it knows is in `core` and `store`; what its thread does is in `task`.

For the serving side, and without a lock, are `lookup`, `acquire`, `record_hit`, `record_miss`, `step_launching`,
`step_missing`, `step_launched` and `step_finished`. The others are for everyone else, from any thread, and take the cache's
lock for a short while.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Collection, Hashable, Iterable
from typing import Generic, TypeVar

from graphcache.capture import Capturer
from graphcache.clock import Clock, SystemClock
from graphcache.core import CacheCore
from graphcache.errors import CacheClosedError, DeviceLostError, GraphStateError
from graphcache.events import Event, EventType, Listener
from graphcache.graph import Graph, GraphInfo, GraphState, Priority
from graphcache.interface import Backend, NoTurns, Program
from graphcache.ledger import BudgetInfo
from graphcache.policy import EvictionPolicy, ValuePolicy, make_policy
from graphcache.profile import Profile, ProfileEntry
from graphcache.settings import CacheSettings, CacheStats, check_bytes, check_stall_budget
from graphcache.task import CaptureTask, tell_quarantine
from graphcache.worker import Signal, Worker, WorkerState

K = TypeVar("K", bound=Hashable)

SHUT_SECONDS = 10.0  # that `close` waits for graphs in use

_PENDING_STATES = (GraphState.QUEUED, GraphState.CAPTURING)


class GraphCache(Generic[K]):
    """Captures in the background what `program` does for a key, and hands back what replays it.

    With `thread=False` there is no capture thread: nothing is captured, evicted in time or destroyed but in
    `run_pending()`, which one thread calls. `policy` overrides the settings' policy.
    """

    def __init__(
        self,
        program: Program[K],
        backend: Backend,
        settings: CacheSettings | None = None,
        *,
        clock: Clock | None = None,
        thread: bool = True,
        policy: EvictionPolicy | None = None,
    ) -> None:
        self.backend = backend
        self.settings = settings = settings if settings is not None else CacheSettings()
        clock = clock if clock is not None else SystemClock()
        signal = Signal()
        self._core: CacheCore[K] = CacheCore(settings, policy or make_policy(settings.policy), clock, wake=signal.set)
        self._store = self._core.store
        capturer: Capturer[K] = Capturer(program, backend, clock, self._core.turns if thread else NoTurns())
        self._task: CaptureTask[K] = CaptureTask(self._core, capturer, signal, shut_seconds=SHUT_SECONDS)
        self._worker = Worker(self._task, signal, is_threaded=thread)
        self._is_threaded = thread
        # Bound once: the hot path reads them at every step.
        self._published = self._store.published
        self._entries = self._store.entries
        self._misses = self._core.misses
        self._wake = signal.set
        self._monotonic = clock.monotonic
        self._pulse = self._core.pulse

    def __repr__(self) -> str:
        return f"GraphCache({self.backend.name}, {self._worker.state.value}, {self._store.ledger!r})"

    def start(self) -> None:
        """Starts the capture thread. What was asked for before is captured then. Raises RuntimeError the second time."""
        self._worker.start()

    def close(self) -> None:
        """Ends the capture thread and destroys all graphs, once those in use are released. May be called again.

        From then on lookups find nothing. Not to be called from a listener.
        """
        self._core.governor.release()
        self._worker.close()

    # The hot path.

    def lookup(self, key: K) -> Graph[K] | None:
        """The published graph of this key. `acquire()` it before replaying, or use `acquire(key)` for both."""
        return self._published.get(key)

    def acquire(self, key: K) -> Graph[K] | None:
        """The published graph of this key, acquired: `release()` it when its replay is over. None is a miss."""
        graph = self._published.get(key)
        if graph is not None and graph.acquire():
            return graph
        return None

    def record_hit(self, graph: Graph[K], seconds: float) -> None:
        """A step of `seconds` replayed the graph."""
        graph.usage.record_hit(seconds, self._pulse.recorded(seconds))

    def record_miss(self, key: K, seconds: float | None = None) -> None:
        """A step of this key ran without its graph: eagerly, in `seconds`, or None where a larger graph stood in.

        Asks for a capture, unless there is a reason against it.
        """
        now = self._pulse.recorded(seconds)
        self._misses.append((key, seconds, now))
        entry = self._entries.get(key)
        if entry is None or entry.wants_capture(now):
            self._wake()

    def step_launching(self) -> None:
        """A step begins, whatever it runs with: to be called before anything of it is put on the device.

        Told of this, of `step_launched` and of `step_finished`, captures take turns with steps, and what they run on the
        device goes between steps. One thread launches, all steps on one stream, and one, maybe another, finishes. Without
        these calls captures go by the records, less exactly. Raises what the backend raises when the device is lost.
        """
        self._pulse.launching()
        self.backend.before_step()

    def step_missing(self) -> None:
        """The step that is being launched has no graph, and would have one: the capture thread may work beside its launches."""
        self._pulse.missing()

    def step_launched(self) -> None:
        """All of the step is put on the device."""
        self.backend.after_step()
        self._pulse.launched()

    def step_finished(self) -> None:
        """A step is over, or was given up."""
        self._pulse.finished()

    # Wishes.

    def request(self, key: K, priority: Priority = Priority.MISS) -> GraphInfo[K]:
        """Queues a capture; one that is queued already is raised to the higher priority.

        Left alone: what is there or under way; and what backs off or is quarantined, unless an operator asks. With a full
        queue the least wanted wish leaves it, which may be this one: then it is EVICTED. Raises CacheClosedError, and
        DeviceLostError once the device is lost.
        """
        with self._core.changing():
            self._check_open()
            self._core.take_misses()
            entry = self._store.entry(key)
            self._core.request(entry, priority)
            return self._store.info(entry)

    def estimate_seconds(self, key: K) -> float:
        """Until a capture of this key, queued now, would be ready: a guess, 0 when it is, finite always."""
        with self._core.changing():
            self._core.take_misses()
            return self._core.estimate_seconds(self._entries.get(key), key)

    def wait(self, keys: Iterable[K], timeout_seconds: float) -> builtins.list[GraphInfo[K]]:
        """Blocks until none of the keys is queued or being captured, or the time is over; says how they stand then.

        Raises UnknownGraphError for a key that was never asked for. Without a capture thread it runs what is pending.
        """
        keys = list(keys)
        if not self._is_threaded:
            self.run_pending()
        with self._core.changing():
            self._core.take_misses()
            entries = [self._store.find(str(key)) for key in keys]
            if self._is_threaded:
                self._core.changed.wait_for(
                    lambda: not any(entry.state in _PENDING_STATES for entry in entries), timeout_seconds
                )
            return [self._store.info(entry) for entry in entries]

    def run_pending(self) -> int:
        """Does what the capture thread would do now; returns the number of captures tried. Only with `thread=False`."""
        if self._is_threaded:
            raise RuntimeError("this cache has a capture thread; it needs nobody to run what is pending")
        num_captures = 0
        while self._worker.state is not WorkerState.CLOSED:
            if self._task.capture_next():
                num_captures += 1
            elif not self._task.verify_next():
                break
        return num_captures

    def pause(self) -> None:
        """No capture starts until `resume()`; one under way stops between its phases."""
        self._core.governor.pause()

    def resume(self) -> None:
        self._core.governor.resume()
        self._wake()

    # What is there.

    @property
    def lost(self) -> DeviceLostError | None:
        """Why nothing is captured any more: the device is lost, and with it what was published. None as long as it works."""
        return self._task.lost

    def list(self, states: Collection[GraphState] = ()) -> builtins.list[GraphInfo[K]]:
        """Entries in one of these states (none: in any), most hits first."""
        with self._core.changing():
            self._settle()
            infos = [self._store.info(entry) for entry in self._entries.values() if not states or entry.state in states]
        return sorted(infos, key=lambda info: (-info.num_hits, info.name))

    def get(self, name: str) -> GraphInfo[K]:
        """Raises UnknownGraphError."""
        with self._core.changing():
            self._settle()
            return self._store.info(self._store.find(name))

    def stats(self) -> CacheStats:
        with self._core.changing():
            self._settle()
            store = self._store
            return CacheStats(
                backend=self.backend.name,
                num_ready=store.num_in_state[GraphState.READY],
                num_pending=sum(store.num_in_state[state] for state in _PENDING_STATES),
                num_hits=store.num_hits,
                num_misses=store.num_misses,
                num_captures=store.num_captures,
                num_evictions=store.num_evictions,
                num_failures=store.num_failures,
                num_quarantines=store.num_quarantines,
                used_bytes=store.ledger.used_bytes,
                limit_bytes=store.ledger.limit_bytes,
                pool_bytes=self.backend.pool_bytes,
                stall_seconds=self._core.governor.stall_seconds,
                stall_budget_seconds=self._core.governor.stall_budget_seconds,
            )

    # Steering.

    def pin(self, name: str, seconds: float) -> GraphInfo[K]:
        """Keeps a ready graph from eviction for so long; again: renews the lease.

        Raises UnknownGraphError, GraphStateError when it is not ready, ValueError unless `seconds` is positive and finite.
        """
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"a lease is positive and finite, not {seconds}")
        with self._core.changing():
            self._settle()
            entry = self._store.find(name)
            self._store.pin(entry, seconds)
            return self._store.info(entry)

    def unpin(self, name: str) -> GraphInfo[K]:
        """Ends a pin, if there is one. Raises UnknownGraphError."""
        with self._core.changing():
            self._settle()
            entry = self._store.find(name)
            self._store.unpin(entry)
            info = self._store.info(entry)
            self._store.settle()
            return info

    def evict(self, name: str) -> GraphInfo[K]:
        """Unpublishes a graph at once; it is destroyed once nothing uses it.

        Raises UnknownGraphError, GraphStateError when it is pinned or not ready.
        """
        with self._core.changing():
            self._settle()
            entry = self._store.find(name)
            if entry.is_pinned:
                raise GraphStateError(f"{name} is pinned")
            self._store.evict(entry, "asked for")
            return self._store.info(entry)

    def report_failure(self, graph: Graph[K], reason: str) -> bool:
        """A published graph failed or gave wrong results: unpublishes it at once, pinned or not, and quarantines its key.

        `reason`: fixed words, shown to operators. Takes the cache's lock, as it should be rare. Returns whether the graph
        was still published. Whoever holds it releases it all the same; it is destroyed once nothing uses it.
        """
        with self._core.changing():
            self._settle()
            entry = self._entries.get(graph.key)
            if entry is None or entry.graph is not graph:
                return False
            self._store.withdraw(entry, reason)
        tell_quarantine(graph.name, reason)
        return True

    def budget(self) -> BudgetInfo:
        with self._core.changing():
            self._settle()
            ledger = self._store.ledger
            return BudgetInfo(
                limit_bytes=ledger.limit_bytes,
                used_bytes=ledger.used_bytes,
                pinned_bytes=ledger.pinned_bytes,
                retiring_bytes=ledger.retiring_bytes,
                pool_bytes=self.backend.pool_bytes,
                kv_cache_bytes=ledger.kv_cache_bytes,
                num_graphs=ledger.num_graphs,
                stall_budget_seconds=self._core.governor.stall_budget_seconds,
            )

    def update_budget(
        self, limit_bytes: int | None = None, stall_budget_seconds: float | None = None
    ) -> builtins.list[str]:
        """Changes what is given; returns the names of the graphs evicted to keep to it. Raises ValueError."""
        if limit_bytes is not None:
            check_bytes("limit_bytes", limit_bytes)
        if stall_budget_seconds is not None:
            check_stall_budget(stall_budget_seconds)
        with self._core.changing():
            self._settle()
            ledger, governor = self._store.ledger, self._core.governor
            if limit_bytes is not None:
                if limit_bytes > ledger.limit_bytes:
                    self._store.forgive_no_room()
                ledger.limit_bytes = limit_bytes
            if stall_budget_seconds is not None:
                governor.stall_budget_seconds = stall_budget_seconds
            detail = f"{ledger.limit_bytes} bytes, {governor.stall_budget_seconds:g} s/s"
            self._core.events.append(EventType.BUDGET_UPDATED, detail=detail)
            evicted = self._store.settle()
        self._wake()
        return evicted

    def set_kv_bytes(self, num_bytes: int) -> builtins.list[str]:
        """Tells the ledger what the KV blocks hold; returns the names of graphs evicted for them. Raises ValueError."""
        check_bytes("num_bytes", num_bytes)
        with self._core.changing():
            self._store.ledger.kv_cache_bytes = num_bytes
            return self._store.settle()

    # Events.

    @property
    def last_sequence(self) -> int:
        """Of the newest event; 0 before the first."""
        return self._core.events.last_sequence

    def events(self, after_sequence: int = 0) -> builtins.list[Event[K]]:
        """The events kept that came after this one; 0: all that are kept. Raises EventsGoneError.

        To follow without a gap: add the listener, then read the events, then drop from it what was read.
        """
        with self._core.changed:
            return self._core.events.after(after_sequence)

    def add_listener(self, listener: Listener[K]) -> None:
        """Has it called with every event from now on, on the thread that made it or another that makes events.

        It must be quick, since it holds that thread up. One that raises is logged and goes on being called.
        """
        self._core.events.add_listener(listener)

    def remove_listener(self, listener: Listener[K]) -> None:
        """Not an error when it is not there. An event under way may still reach it."""
        self._core.events.remove_listener(listener)

    # Profiles.

    def export_profile(self, max_entries: int = 256) -> Profile[K]:
        """What was used, most valuable first, whatever the policy."""
        with self._core.changing():
            self._settle()
            now, half_life_seconds = self._monotonic(), self.settings.demand_half_life_seconds
            value = ValuePolicy()
            used = [entry for entry in self._entries.values() if entry.usage.num_uses]
            used.sort(
                key=lambda entry: (
                    value.score(entry.candidate(now, half_life_seconds)),
                    entry.usage.num_uses,
                    entry.name,
                ),
                reverse=True,
            )
            return Profile(
                tuple(
                    ProfileEntry(
                        key=entry.key,
                        num_hits=entry.usage.num_hits,
                        num_misses=entry.usage.num_misses,
                        saved_seconds=entry.saved_seconds or 0.0,
                        size_bytes=entry.size_bytes,
                    )
                    for entry in used[:max_entries]
                )
            )

    def import_profile(self, profile: Profile[K]) -> tuple[int, int]:
        """Queues what was hot, in the profile's order, as far as the budget goes; returns how many, and how many not.

        Skipped is what is there, under way or backing off, and what would not fit behind the entries before it. Raises
        CacheClosedError, and DeviceLostError once the device is lost.
        """
        with self._core.changing():
            self._check_open()
            self._settle()
            num_queued = self._core.plan_profile(profile)
            num_skipped = len(profile.entries) - num_queued
            detail = f"{num_queued} queued, {num_skipped} skipped"
            self._core.events.append(EventType.PROFILE_IMPORTED, detail=detail)
            return num_queued, num_skipped

    def _check_open(self) -> None:
        if self._worker.state is WorkerState.CLOSED:
            raise CacheClosedError("the cache was closed")
        if self._task.lost is not None:
            raise DeviceLostError(str(self._task.lost)) from self._task.lost

    def _settle(self) -> None:
        """Brings what is about to be shown or changed up to date."""
        self._core.take_misses()
        self._store.settle()
