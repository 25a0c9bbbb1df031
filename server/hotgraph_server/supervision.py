"""What the service manager is told, and when: ready, a status line, that the daemon is alive, that it may take longer.

The watchdog is fed only while two things hold: the event loop comes round in time, and the engine gives its steps back. A
timer of its own would go on for ever beside an engine that hangs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from graphcache import Clock
from hotgraph_server.rpc import DaemonState, Lifecycle
from hotgraph_server.systemd import Notifier

BEAT_SECONDS: Final = 1.0
BEATS_PER_WATCHDOG: Final = 8  # at least: what stops is noticed after the watchdog's time and at most one beat
MAX_LATE_SECONDS: Final = 5.0  # of the event loop; a loop that is later serves nobody
EXTENSION_SECONDS: Final = 60.0  # of the start, for each beat in which loading got on
MIN_PROGRESS_RATIO: Final = 0.05  # of a processor; the beats themselves take far less
MIN_PROGRESS_BYTES: Final = 1 << 16
IO_COUNTS: Final = Path("/proc/self/io")


class Heartbeat:
    """Whether the daemon deserves another sign of life. Times are of one monotonic clock."""

    def __init__(self, now: float) -> None:
        self._last_beat = now

    def beats(self, now: float, *, late_seconds: float, engine_moved_at: float | None) -> bool:
        """To be asked at each beat, which came `late_seconds` late.

        `engine_moved_at`: when the engine last took or gave back a step; None when it has nothing to do.
        """
        is_moving = engine_moved_at is None or engine_moved_at >= self._last_beat
        self._last_beat = now
        return is_moving and late_seconds <= MAX_LATE_SECONDS


class Progress:
    """Whether a process that loads gets on: it computes, or reads. A load that waits for a dead disk does neither."""

    def __init__(self) -> None:
        self._last = self._now()

    def has_moved(self) -> bool:
        """Since the last call."""
        last, self._last = self._last, self._now()
        seconds, processor_seconds, num_bytes = (now - then for now, then in zip(self._last, last, strict=True))
        return processor_seconds > MIN_PROGRESS_RATIO * seconds or num_bytes >= MIN_PROGRESS_BYTES

    @staticmethod
    def _now() -> tuple[float, float, int]:
        """The time, processor time of this process, both in seconds, and the bytes that it has read."""
        lines = IO_COUNTS.read_text().splitlines() if IO_COUNTS.exists() else []
        num_bytes = next((int(line.split()[1]) for line in lines if line.startswith("rchar:")), 0)
        return time.monotonic(), time.process_time(), num_bytes


class Supervision:
    """Tells a Notifier of one daemon. Event loop's thread only.

    `describe` is the status line; `engine_moved_at` as for `Heartbeat`, on `clock`.
    """

    def __init__(
        self,
        notifier: Notifier,
        lifecycle: Lifecycle,
        *,
        clock: Clock,
        describe: Callable[[], str],
        engine_moved_at: Callable[[], float | None],
    ) -> None:
        self._notifier = notifier
        self._lifecycle = lifecycle
        self._clock = clock
        self._describe = describe
        self._engine_moved_at = engine_moved_at
        self._told = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to beat, if there is a manager to hear it."""
        if self._notifier.is_listened_to:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="supervision")

    def ready(self) -> None:
        """The daemon serves, or has ended a reload."""
        self._told = self._describe()
        self._notifier.ready(self._told)

    def reloading(self) -> None:
        self._notifier.reloading()

    def stopping(self, seconds: float) -> None:
        """The daemon ends, within that time."""
        self._told = self._describe()
        self._notifier.stopping(self._told, seconds)

    async def stop(self) -> None:
        """Beats no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _run(self) -> None:
        watchdog_seconds = self._notifier.watchdog_seconds
        interval = BEAT_SECONDS
        if watchdog_seconds is not None:
            interval = min(interval, watchdog_seconds / BEATS_PER_WATCHDOG)
        progress, heartbeat = Progress(), Heartbeat(self._clock.monotonic())
        due = self._clock.monotonic()
        while True:
            now = self._clock.monotonic()
            self._tell()
            if self._lifecycle.state is DaemonState.STARTING and progress.has_moved():
                self._notifier.extend(EXTENSION_SECONDS)
            is_alive = heartbeat.beats(now, late_seconds=now - due, engine_moved_at=self._engine_moved_at())
            if watchdog_seconds is not None and is_alive:
                self._notifier.alive()
            due = now + interval
            await asyncio.sleep(interval)

    def _tell(self) -> None:
        text = self._describe()
        if text != self._told:
            self._told = text
            self._notifier.status(text)
