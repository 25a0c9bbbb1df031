"""The capture thread's turns: not while captures are paused, and beside steps when those who are served leave it room."""

from __future__ import annotations

from graphcache.clock import Clock
from graphcache.governor import Governor
from graphcache.pulse import Pulse


class CaptureTurns:
    """Implements Turns. What is waited for is nobody's interference: the governor is told how long it was."""

    def __init__(self, governor: Governor, pulse: Pulse, clock: Clock) -> None:
        self._governor = governor
        self._pulse = pulse
        self._clock = clock

    def wait(self) -> None:
        """See Turns. For the capture thread."""
        self._governor.wait_while_paused()
        started = self._clock.monotonic()
        self._pulse.take_turn()
        self._governor.waited_seconds += self._clock.monotonic() - started

    def device_seconds(self) -> float:
        """See Turns."""
        return self._pulse.turn_seconds()

    def host_seconds(self) -> float:
        """See Turns. Nothing is left while captures are paused."""
        return 0.0 if self._governor.is_paused else self._pulse.quiet_seconds()
