"""What the capture thread does at each step: take in misses, keep the budget, destroy, report, capture the next."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from typing import Generic, TypeVar

from graphcache.capture import Capturer, MismatchError
from graphcache.core import NEW_SAMPLE_WEIGHT, CacheCore
from graphcache.entry import Entry
from graphcache.errors import CaptureError, DeviceLostError
from graphcache.events import EventType
from graphcache.graph import CaptureTimings, GraphState
from graphcache.interface import Captured
from graphcache.store import NO_ROOM
from graphcache.worker import Signal

K = TypeVar("K", bound=Hashable)

log = logging.getLogger("graphcache")

MAX_SECOND_FAILURES = 3  # of second looks at a graph, before it is withdrawn
UNPUBLISHED = "it could not be published; the log has it"
IDLE_LOOK_SECONDS = 0.25  # between looks whether nobody is served any more, where that is waited for


def tell_quarantine(name: str, reason: str) -> None:
    """To the log: this graph is not used any more. Without the cache's lock, as handlers may be slow."""
    log.error("%s is quarantined: %s", name, reason)


class CaptureTask(Generic[K]):
    """The capture thread's work. All methods run on that thread, or where there is none, on one caller's."""

    def __init__(self, core: CacheCore[K], capturer: Capturer[K], signal: Signal, *, shut_seconds: float) -> None:
        self._core = core
        self._capturer = capturer
        self._signal = signal
        self._shut_seconds = shut_seconds
        self.lost: DeviceLostError | None = None
        self._report_monotonic = core.clock.monotonic() + core.settings.statistics_interval_seconds

    def open(self) -> None:
        """Starts the backend. Raises CaptureError; the first capture tries again."""
        self._capturer.open()

    def step(self) -> float:
        """Captures one graph if one may be captured now, or looks again at one, and says 0; else how long there is nothing
        to do."""
        return 0.0 if self.capture_next() or self.verify_next() else self._idle_seconds()

    def capture_next(self) -> bool:
        """Housekeeping, then at most one capture. Whether there was one, successful or not."""
        core = self._core
        with core.changing():
            core.take_misses()
            core.store.settle()
            self._report()
        self._destroy_idle()
        with core.changing():
            if not self._may_capture():
                return False
            entry = core.store.entries[core.pending.pop()]
            # Asked before the work for a size that is known or guessed, and again after it for the measured one; who has
            # to go does so only then, so that a capture that fails costs nobody a graph.
            if core.store.victims(entry, entry.size_bytes) is None:
                core.store.fail(entry, NO_ROOM)
                has_room = False
            else:
                core.store.begin(entry)
                has_room = True
        if not has_room:
            log.warning("no capture of %s: %s", entry.name, NO_ROOM)
            return True
        self._capture(entry)
        self._destroy_idle()
        return True

    def verify_next(self) -> bool:
        """While nobody is served: asks again about one published graph that was only told to be in order beside others.

        Whether that said more than before. One that is wrong, or cannot be told again and again, is withdrawn, and its key
        quarantined.
        """
        core = self._core
        with core.changing():
            if self.lost is not None or core.is_serving or core.governor.is_paused:
                return False
            entry = core.store.unreplayed(core.clock.monotonic())
            graph = entry.graph if entry is not None else None
            if entry is None or graph is None or not graph.acquire():
                return False
        started, waited_seconds = core.clock.monotonic(), core.governor.waited_seconds
        failure, is_replayed, is_withdrawn = "", False, False
        try:
            is_replayed = self._capturer.verify_again(graph).is_replayed
        except MismatchError as error:
            failure = str(error)
        except CaptureError as error:
            entry.num_second_failures += 1
            if entry.num_second_failures == MAX_SECOND_FAILURES:
                failure = str(error)
        except DeviceLostError as error:
            self._lose(error)
            return False
        finally:
            graph.release()
        with core.changing():
            self._charge(started, waited_seconds)
            if entry.graph is graph:  # it may be gone meanwhile
                if failure:
                    core.store.withdraw(entry, failure)
                    is_withdrawn = True
                elif is_replayed:
                    entry.is_replayed = True
                    core.store.tell_progress(EventType.VERIFIED, entry)
                else:  # it could not be told: somebody came to be served, say
                    core.store.put_off(entry)
        if is_withdrawn:
            tell_quarantine(graph.name, failure)
        self._destroy_idle()
        return bool(is_replayed or failure)

    def shut(self) -> None:
        """Empties queue and cache, destroys every graph once nothing uses it, closes the backend."""
        core = self._core
        with core.changing():
            core.is_closed = True
            for key in core.pending.clear():
                core.store.unplan(core.store.entries[key], "the cache was closed")
            for key in tuple(core.store.published):
                entry = core.store.entries[key]
                core.store.unpin(entry, "the cache was closed")
                core.store.evict(entry, "the cache was closed")
        deadline = time.monotonic() + self._shut_seconds  # a real wait, whatever the cache's clock is
        self._destroy_idle()
        while core.store.retired and (seconds := deadline - time.monotonic()) > 0:
            self._signal.wait(seconds)
            self._destroy_idle()
        if core.store.retired:
            names = ", ".join(retired.graph.name for retired in core.store.retired)
            log.error("these graphs were still in use when the cache was closed, and are left as they are: %s", names)
        else:
            self._capturer.close()

    def _may_capture(self) -> bool:
        core = self._core
        if not core.pending or core.governor.delay_seconds(is_serving=core.is_serving) > 0:
            return False
        # Graphs that are evicted but still in use hold their memory: no new ones on top, until the fence is passed.
        ledger = core.store.ledger
        return ledger.retiring_bytes == 0 or ledger.used_bytes + ledger.retiring_bytes <= ledger.graph_limit_bytes

    def _capture(self, entry: Entry[K]) -> None:
        core = self._core
        started, waited_seconds = core.clock.monotonic(), core.governor.waited_seconds
        try:
            captured, timings, is_replayed = self._record(entry, started)
        except MismatchError as error:
            with core.changing():
                core.store.quarantine(entry, str(error))
            tell_quarantine(entry.name, str(error))
        except CaptureError as error:
            with core.changing():
                core.store.fail(entry, str(error))
        except DeviceLostError as error:
            self._lose(error)
            with core.changing():
                core.store.fail(entry, str(error))
        else:
            try:
                self._publish(entry, captured, timings, is_replayed=is_replayed)
            except Exception:  # our own mistake: it costs this graph, and not what comes after it
                log.exception("publishing %s failed", entry.name)
                self._give_up(entry, captured)
        with core.changing():
            core.capture_seconds += NEW_SAMPLE_WEIGHT * (self._charge(started, waited_seconds) - core.capture_seconds)

    def _charge(self, started: float, waited_seconds: float) -> float:
        """Takes what was done since `started` off the stall budget; returns its seconds. While it stood still it held nobody
        up; `waited_seconds`: what the governor had waited by then."""
        core = self._core
        seconds = core.clock.monotonic() - started - (core.governor.waited_seconds - waited_seconds)
        core.governor.charge(seconds, is_serving=core.is_serving)
        return seconds

    def _lose(self, error: DeviceLostError) -> None:
        """Nothing is captured any more; what is published stays, and fails in the hands of whoever replays it."""
        core = self._core
        log.critical("no capture from now on: %s", error)
        with core.changing():
            self.lost = error
            core.is_closed = True
            core.events.append(EventType.FAILED, detail=str(error))
            for key in core.pending.clear():
                core.store.unplan(core.store.entries[key], str(error))

    def _record(self, entry: Entry[K], started: float) -> tuple[Captured, CaptureTimings, bool]:
        """And whether its verification needs no second look. Raises CaptureError or DeviceLostError, and then nothing is left
        of it."""
        core = self._core
        captured = self._capturer.capture(entry.key, entry.name)
        with core.changing():
            core.store.tell_progress(EventType.CAPTURED, entry)
        verification = self._capturer.verify(entry.key, entry.name, captured)
        if verification is not None:
            with core.changing():
                core.store.tell_progress(EventType.VERIFIED, entry)
        timings = CaptureTimings(
            queue_seconds=started - entry.queued_monotonic,
            record_seconds=captured.record_seconds,
            instantiate_seconds=captured.instantiate_seconds,
            verify_seconds=verification.seconds if verification is not None else 0.0,
        )
        return captured, timings, verification is None or verification.is_replayed

    def _publish(self, entry: Entry[K], captured: Captured, timings: CaptureTimings, *, is_replayed: bool) -> None:
        core = self._core
        with core.changing():
            core.store.settle()
            victims = core.store.victims(entry, captured.size_bytes)
            if victims is not None:
                for victim in victims:
                    core.store.evict(victim, "for one that is wanted more")
                core.store.publish(entry, captured, timings, is_replayed=is_replayed)
            else:
                entry.size_bytes = captured.size_bytes  # known from now on: not captured again in vain
                core.store.fail(entry, NO_ROOM)
        if victims is None:
            self._capturer.destroy(entry.name, captured)
            log.warning("no capture of %s: %s", entry.name, NO_ROOM)

    def _give_up(self, entry: Entry[K], captured: Captured) -> None:
        """Destroys what was captured and not published, and has its key tried again later."""
        with self._core.changing():
            if entry.state is not GraphState.CAPTURING:
                return  # it was published all the same
            entry.graph = entry.captured = entry.segment = None
            self._core.store.fail(entry, UNPUBLISHED)
        self._capturer.destroy(entry.name, captured)

    def _destroy_idle(self) -> None:
        core = self._core
        with core.changing():
            idle = core.store.take_idle()
        for retired in idle:
            retired.graph.disarm()
            self._capturer.destroy(retired.graph.name, retired.captured)
            with core.changing():
                core.store.ledger.free(retired.size_bytes)

    def _report(self) -> None:
        now = self._core.clock.monotonic()
        if now >= self._report_monotonic:
            self._report_monotonic = now + self._core.settings.statistics_interval_seconds
            self._core.store.report_statistics()

    def _idle_seconds(self) -> float:
        core = self._core
        with core.changed:
            seconds = core.settings.statistics_interval_seconds
            if core.pending:
                delay_seconds = core.governor.delay_seconds(is_serving=core.is_serving)
                if delay_seconds > 0:  # 0: what it waits for is a release, which wakes
                    seconds = min(seconds, delay_seconds)
            if core.is_serving and (core.pending or core.store.has_unreplayed):
                seconds = min(seconds, IDLE_LOOK_SECONDS)
            return seconds
