"""A CUDA runtime and a torch that record and replay plain functions, and break in the ways that real ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from graphcache.backends.cuda_runtime import OUT_OF_MEMORY, CudaCallError

DEFAULT_STREAM = 1
LOST = CudaCallError("any", 700, "cudaErrorIllegalAddress")
BROKEN = CudaCallError("cudaStreamEndCapture", 901, "cudaErrorStreamCaptureInvalidated")
NO_MEMORY = CudaCallError("cudaGraphInstantiate", OUT_OF_MEMORY, "cudaErrorMemoryAllocation")

Kernel = tuple[str, Callable[[], None]]  # its kind, which an update cannot change, and what it does


@dataclass
class Stream:
    recorded: list[Kernel] | None = None  # None: it does not capture
    is_broken: bool = False
    is_stuck: bool = False  # it goes on capturing whatever is tried


class OutOfMemoryError(RuntimeError):
    """As torch's."""


class FakeRuntime:
    """Says in `calls` what was called, with the stream's or executable's number where it matters."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.streams: dict[int, Stream] = {DEFAULT_STREAM: Stream()}
        self.graphs: dict[int, list[Kernel]] = {}
        self.events: dict[int, int | None] = {}  # the stream that each was last recorded on
        self.executables: dict[int, list[Kernel]] = {}
        self.current = DEFAULT_STREAM
        self.failures: dict[str, list[CudaCallError]] = {}  # by method, each raised once, the first first
        self.is_lost = False
        self.executable_bytes = 0  # that an instantiate takes
        self.free = 1 << 34
        self._num_handles = 100

    def launch(self, kind: str, kernel: Callable[[], None]) -> None:
        """What work does: runs a kernel on the current stream, or has it recorded."""
        stream = self.streams[self.current]
        if stream.recorded is None:
            kernel()
        else:
            stream.recorded.append((kind, kernel))

    def wait(self) -> None:
        """What work that is captured must not do."""
        stream = self.streams[self.current]
        if stream.recorded is not None:
            stream.is_broken = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def take_stream(self) -> int:
        self._call("take_stream")
        handle = self._handle()
        self.streams[handle] = Stream()
        return handle

    def return_stream(self, stream: int) -> None:
        self._call("return_stream", stream)
        del self.streams[stream]

    def synchronize_stream(self, stream: int) -> None:
        self._call("synchronize_stream", stream)
        assert self.streams[stream].recorded is None, "a capturing stream was waited for"

    def make_event(self) -> int:
        self._call("make_event")
        event = self._handle()
        self.events[event] = None
        return event

    def record_event(self, event: int, stream: int) -> None:
        self._call("record_event", stream)
        assert event in self.events, "an event that is not there was recorded"
        self.events[event] = stream

    def wait_event(self, stream: int, event: int) -> None:
        self._call(f"wait_event of {self.events[event]}", stream)
        assert self.streams[stream].recorded is None, "a capturing stream was put behind another"

    def destroy_event(self, event: int) -> None:
        self._call("destroy_event")
        del self.events[event]

    def begin_capture(self, stream: int) -> None:
        self._call("begin_capture", stream)
        assert self.streams[stream].recorded is None
        self.streams[stream].recorded = []

    def end_capture(self, stream: int) -> int:
        self._call("end_capture", stream)
        state = self.streams[stream]
        assert state.recorded is not None, "no capture to end"
        recorded, is_broken = state.recorded, state.is_broken
        if state.is_stuck:
            raise BROKEN
        state.recorded, state.is_broken = None, False
        if is_broken:
            raise BROKEN
        handle = self._handle()
        self.graphs[handle] = recorded
        return handle

    def is_capturing(self, stream: int) -> bool:
        self._call("is_capturing", stream)
        return self.streams[stream].recorded is not None

    def num_nodes(self, graph: int) -> int:
        return len(self.graphs[graph])

    def edge_types(self, graph: int) -> tuple[int, ...]:
        """A chain, whose edges are programmatic (1) before kernels of a kind that begins with "early"."""
        return tuple(int(kind.startswith("early")) for kind, _ in self.graphs[graph][1:])

    def destroy_graph(self, graph: int) -> None:
        self._call("destroy_graph")
        del self.graphs[graph]

    def instantiate(self, graph: int) -> int:
        self._call("instantiate")
        handle = self._handle()
        self.executables[handle] = list(self.graphs[graph])
        self.free -= self.executable_bytes
        return handle

    def update(self, executable: int, graph: int) -> bool:
        self._call("update", executable)
        kinds = [[kind for kind, _ in kernels] for kernels in (self.executables[executable], self.graphs[graph])]
        if kinds[0] != kinds[1]:
            return False
        self.executables[executable] = list(self.graphs[graph])
        return True

    def upload(self, executable: int, stream: int) -> None:
        self._call("upload", executable)
        assert executable in self.executables
        assert stream in self.streams

    def destroy_executable(self, executable: int) -> None:
        self._call("destroy_executable", executable)
        del self.executables[executable]

    def launcher(self, executable: int, current_stream: Callable[[], int]) -> Callable[[], None]:
        def replay() -> None:
            assert self.streams[current_stream()].recorded is None, "a graph was launched into a capture"
            for _, kernel in self.executables[executable]:
                kernel()

        return replay

    def free_bytes(self) -> int:
        self._call("free_bytes")
        return self.free

    def _call(self, method: str, handle: int | None = None) -> None:
        self.calls.append(method if handle is None else f"{method} {handle}")
        if self.is_lost:
            raise LOST
        if self.failures.get(method):
            raise self.failures[method].pop(0)

    def _handle(self) -> int:
        self._num_handles += 1
        return self._num_handles


class FakeTorch:
    """Torch as the backend sees it, on a FakeRuntime. Its calls are told in the runtime's."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self.runtime = runtime
        self.calls = runtime.calls
        self.warm_streams: list[int] = []
        self.pool = 0
        self.reserved = 0
        self.is_kept = False
        self.num_cleared = 0
        self._is_recording = False

    def allocate(self, num_bytes: int) -> None:
        """What work does: takes memory, from the pool while that is in force."""
        self.reserved += num_bytes
        self.runtime.free -= num_bytes
        if self._is_recording:
            self.pool += num_bytes

    def open(self) -> None:
        self.calls.append("open")

    def close(self) -> None:
        self.calls.append("close")

    def keep_pool(self) -> None:
        self.is_kept = True

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        before, self.runtime.current = self.runtime.current, stream
        try:
            yield
        finally:
            self.runtime.current = before

    @contextmanager
    def recording(self, stream: int, *, is_rehearsal: bool = False) -> Iterator[None]:
        self.calls.append("rehearsal pool on" if is_rehearsal else "pool on")
        self._is_recording = not is_rehearsal
        try:
            with self.on_stream(stream):
                yield
        finally:
            self._is_recording = False
            self.calls.append("rehearsal pool off" if is_rehearsal else "pool off")

    def warm_libraries(self) -> None:
        assert self.runtime.streams[self.runtime.current].recorded is None, "libraries were warmed inside a capture"
        self.calls.append("warm_libraries")
        self.warm_streams.append(self.runtime.current)

    def current_stream(self) -> Callable[[], int]:
        return lambda: self.runtime.current

    def pool_bytes(self) -> int:
        return self.pool

    def reserved_bytes(self) -> int:
        return self.reserved

    def clear_last_error(self) -> None:
        self.num_cleared += 1

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, OutOfMemoryError)
