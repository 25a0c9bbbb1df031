"""Turns that do and say what a test wants."""

from __future__ import annotations

from collections.abc import Callable

from graphcache import NoTurns


class GivenTurns(NoTurns):
    """Each wait is a call of `on_wait`; `device` and `host` are what is left, in seconds."""

    def __init__(self, on_wait: Callable[[], object], *, device: float = 0.0, host: float = float("inf")) -> None:
        self._on_wait = on_wait
        self.device = device
        self.host = host

    def wait(self) -> None:
        self._on_wait()

    def device_seconds(self) -> float:
        return self.device

    def host_seconds(self) -> float:
        return self.host
