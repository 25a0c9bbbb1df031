"""What the cache asks of its user and of what captures: `Program`, `Backend`, `Captured`. No torch here, nor needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

K_contra = TypeVar("K_contra", bound=Hashable, contravariant=True)


class Turns(Protocol):
    """How the capture thread shares the host and the device with those who are served. Given to a backend."""

    def wait(self) -> None:
        """Between the phases of a capture, and between parts of what it runs: returns when the capture may go on.

        It waits while captures are paused, and while others are served until their next step is launched.
        """
        ...

    def device_seconds(self) -> float:
        """How much of the device's time a part should take at most, as things are; 0: every part is a turn of its own."""
        ...

    def host_seconds(self) -> float:
        """How long Python may run now before those who are served want the interpreter; infinite while nobody is."""
        ...


class NoTurns:
    """Nobody else is served: never waits. Every part of what is run is one by itself."""

    def wait(self) -> None:
        """Returns at once."""

    def device_seconds(self) -> float:
        return 0.0

    def host_seconds(self) -> float:
        return math.inf


class Program(Protocol[K_contra]):
    """What is captured, given by the user. Every method is called on the capture thread."""

    def bind(self, key: K_contra) -> Callable[[], None]:
        """The work for `key`, over static buffers: no arguments, no result, the same pointers at each call.

        Loads and compiles everything the work needs, now, since a capture must not: `Backend.warm_up` runs it for that.
        Raises CaptureError.
        """
        ...

    def verify(self, key: K_contra, replay: Callable[[], None]) -> bool | None:
        """Whether `replay` gives the eager result on inputs other than those it was captured with.

        None: what can be told beside those who are served is in order, and `replay` itself was not run yet. Then the graph
        is published, and this is asked again once nobody is served. Must not disturb what is being served: it has buffers
        of its own, or waits for a gap. Raises CaptureError.
        """
        ...


class Captured(Protocol):
    """One recording of a program's work."""

    @property
    def size_bytes(self) -> int:
        """Memory that destroying it gives back, measured; the cache's ledger counts it."""
        ...

    @property
    def record_seconds(self) -> float: ...

    @property
    def instantiate_seconds(self) -> float: ...

    def replay(self) -> None:
        """Runs the work again: launches it, where there is a device. Called on the serving thread; must be cheap."""
        ...

    def destroy(self) -> None:
        """Frees it, or keeps it for reuse by a later capture. Called once, on the capture thread, with no use left."""
        ...


class Backend(Protocol):
    """How work is captured. Every method is called on the capture thread, which is the same one for the cache's life; what is
    no method is read on any thread."""

    @property
    def name(self) -> str: ...

    @property
    def is_fixed_shape(self) -> bool:
        """Whether a capture runs for its bucket's whole shape, so that smaller steps must be padded to it."""
        ...

    @property
    def needs_verification(self) -> bool:
        """Whether a replay could differ from the eager run at all."""
        ...

    @property
    def pool_bytes(self) -> int:
        """Memory that captures share, as of the last one; 0 where they share none. It stays when they are destroyed.

        What a capture grew it by is in that one's size, too.
        """
        ...

    def start(self, turns: Turns) -> None:
        """Before the first capture: make streams, warm libraries on this thread. Raises CaptureError; tried again later.

        From then on the backend may wait for its turn between the phases of a capture, and between parts of what it runs.
        """
        ...

    def capture(self, name: str, work: Callable[[], None]) -> Captured:
        """Records `work` and makes it launchable.

        Raises CaptureError, and then holds nothing of it; DeviceLostError when no capture can succeed any more.
        """
        ...

    def warm_up(self, work: Callable[[], None]) -> None:
        """Runs `work` once, for real, apart from what is served, and returns when it is over. For a program's `bind`.

        It must not touch what is being served. Raises CaptureError, or DeviceLostError.
        """
        ...

    def rehearse(self, work: Callable[[], None]) -> None:
        """Runs `work` once, like `warm_up`, but as it would be captured: records each part of it and replays that at once.

        For a program's `verify` while others are served: parts take turns with their steps, where a whole replay would hold
        them up. Raises CaptureError, or DeviceLostError.
        """
        ...

    def give_way(self, seconds: float = math.inf) -> None:
        """For `work` to call wherever it may be cut: what is run apart from what is served goes on when that had its turn.

        `seconds`: about how long what was put on the device since the last call takes there. In `warm_up` and `rehearse` work
        is cut here if with as much again it would take more than a turn's time; without `seconds`, always. All of it so far is
        over then when this returns. In `capture` recording may only stand still for a while, and on any other thread than the
        capture thread it does nothing.
        """
        ...

    def before_step(self) -> None:
        """A step is about to be put on the device. On the serving thread, on the stream of its steps; must be cheap.

        With `after_step`, a backend may let parts of `warm_up` and `rehearse` in between steps: two that share the device
        slow each other down by more than either takes.
        """
        ...

    def after_step(self) -> None:
        """All of that step is on the device's queue. Likewise."""
        ...

    def close(self) -> None:
        """After the last destroy. Called only if `start` succeeded."""
        ...
