"""The backend where there is nothing to capture: a replay runs the bound work. Everything around it is real."""

from __future__ import annotations

import math
from collections.abc import Callable

from graphcache.errors import GraphStateError
from graphcache.interface import Turns


class EagerCaptured:
    """The bound work, kept."""

    record_seconds = 0.0
    instantiate_seconds = 0.0

    def __init__(self, work: Callable[[], None], size_bytes: int) -> None:
        self.replay: Callable[[], None] = work
        self.size_bytes = size_bytes

    def destroy(self) -> None:
        """Drops the work. Raises GraphStateError from then on when replayed."""
        self.replay = self._gone

    @staticmethod
    def _gone() -> None:
        raise GraphStateError("the work of this capture was dropped")


class EagerBackend:
    """Keeps the work. `size_bytes(name)` says what a graph counts in the ledger: nothing, unless told otherwise."""

    name = "eager"
    is_fixed_shape = False
    needs_verification = False
    pool_bytes = 0

    def __init__(self, size_bytes: Callable[[str], int] | None = None) -> None:
        self._size_bytes = size_bytes

    def start(self, turns: Turns) -> None:
        """Nothing to prepare."""

    def capture(self, name: str, work: Callable[[], None]) -> EagerCaptured:
        return EagerCaptured(work, self._size_bytes(name) if self._size_bytes is not None else 0)

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def rehearse(self, work: Callable[[], None]) -> None:
        work()

    def give_way(self, seconds: float = math.inf) -> None:
        """Nothing to wait for."""

    def before_step(self) -> None:
        """Nothing runs beside steps but on the host."""

    def after_step(self) -> None:
        """Likewise."""

    def close(self) -> None:
        """Nothing to give back."""
