"""The calls of the CUDA runtime that the CUDA backend makes, their error codes turned into exceptions. No torch, no cache.

Handles are plain integers: this runtime and torch's are two copies of one library, and streams, graphs and executables mean
the same to both. Every call but the launch, and an event's record and wait, is made on the capture thread; all of them release
the interpreter's lock.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

from cuda.bindings import runtime as cudart  # type: ignore[import-untyped]  # it ships no types

OUT_OF_MEMORY = int(cudart.cudaError_t.cudaErrorMemoryAllocation)
PROGRAMMATIC = int(cudart.cudaGraphDependencyType.cudaGraphDependencyTypeProgrammatic)
"""The type of an edge after which the second kernel may start before the first one ends."""
MAX_STREAM_OBJECTS = 256  # kept for handles seen at launch; they are wrapped integers, and a program has a few streams

_idle_streams: defaultdict[int, list[int]] = defaultdict(list)
"""By device. Streams are never destroyed: torch notes on which ones memory was used, and asks those when it is freed."""


class CudaCallError(Exception):
    """A call of the runtime returned an error code. `code_name` is the runtime's own word for it."""

    def __init__(self, call: str, code: int, code_name: str) -> None:
        super().__init__(f"{call}: {code_name}")
        self.call = call
        self.code = code
        self.code_name = code_name


class Runtime(Protocol):
    """What the backend asks of the runtime: the seam that tests put a fake behind. Every method raises CudaCallError."""

    def take_stream(self) -> int:
        """A stream of the lowest priority that does not wait for the default stream."""
        ...

    def return_stream(self, stream: int) -> None:
        """Another backend of this process may take it from now on. Only an idle one, that does not capture."""
        ...

    def synchronize_stream(self, stream: int) -> None:
        """Waits for what was put on this stream, and for nothing else."""
        ...

    def make_event(self) -> int:
        """One that tells no time."""
        ...

    def record_event(self, event: int, stream: int) -> None:
        """The event marks what is on the stream now, and nothing that it marked before. For any thread, and cheap."""
        ...

    def wait_event(self, stream: int, event: int) -> None:
        """What is put on the stream from now on goes behind what the event marks now. For any thread, and cheap."""
        ...

    def destroy_event(self, event: int) -> None: ...

    def begin_capture(self, stream: int) -> None:
        """What this thread puts on the stream is recorded from now on; other threads may do as they like meanwhile."""
        ...

    def end_capture(self, stream: int) -> int:
        """The graph of what was recorded. Raises CudaCallError for a capture that was broken; it is over even so."""
        ...

    def is_capturing(self, stream: int) -> bool:
        """Also while a broken capture waits for its end."""
        ...

    def num_nodes(self, graph: int) -> int: ...

    def edge_types(self, graph: int) -> tuple[int, ...]:
        """Of every edge, in the driver's order: whether the second node waits for the end of the first, or starts before."""
        ...

    def destroy_graph(self, graph: int) -> None: ...

    def instantiate(self, graph: int) -> int:
        """An executable of the graph, which needs the graph no more. It runs at the priority of the launching stream."""
        ...

    def update(self, executable: int, graph: int) -> bool:
        """Makes the executable do what `graph` does, from its next launch on; one that runs is left as it is.

        False where they differ in more than an update can change. Then the executable must not be launched before another
        update of it succeeded.
        """
        ...

    def upload(self, executable: int, stream: int) -> None:
        """Puts it where a launch needs it, so that the first launch does not have to. Behind launches of it that run."""
        ...

    def destroy_executable(self, executable: int) -> None:
        """A launch that runs still ends as it should; the memory comes back after it."""
        ...

    def launcher(self, executable: int, current_stream: Callable[[], int]) -> Callable[[], None]:
        """What launches it on the stream that is current then. The hot path: for any thread, and cheap."""
        ...

    def free_bytes(self) -> int:
        """Device memory that nobody holds, in all processes; it moves in steps of 2 MiB."""
        ...


class CudaRuntime:
    """The real one."""

    def __init__(self) -> None:
        self._streams = _Streams()

    def take_stream(self) -> int:
        with contextlib.suppress(IndexError):
            return _idle_streams[self._device()].pop()
        lowest, _highest = check("cudaDeviceGetStreamPriorityRange", cudart.cudaDeviceGetStreamPriorityRange())
        created = cudart.cudaStreamCreateWithPriority(cudart.cudaStreamNonBlocking, lowest)
        return int(check("cudaStreamCreateWithPriority", created))

    def return_stream(self, stream: int) -> None:
        _idle_streams[self._device()].append(stream)

    def _device(self) -> int:
        return int(check("cudaGetDevice", cudart.cudaGetDevice()))

    def synchronize_stream(self, stream: int) -> None:
        check("cudaStreamSynchronize", cudart.cudaStreamSynchronize(stream))

    def make_event(self) -> int:
        created = cudart.cudaEventCreateWithFlags(cudart.cudaEventDisableTiming)
        return int(check("cudaEventCreateWithFlags", created))

    def record_event(self, event: int, stream: int) -> None:
        check("cudaEventRecord", cudart.cudaEventRecord(cudart.cudaEvent_t(event), stream))

    def wait_event(self, stream: int, event: int) -> None:
        check("cudaStreamWaitEvent", cudart.cudaStreamWaitEvent(stream, cudart.cudaEvent_t(event), 0))

    def destroy_event(self, event: int) -> None:
        check("cudaEventDestroy", cudart.cudaEventDestroy(cudart.cudaEvent_t(event)))

    def begin_capture(self, stream: int) -> None:
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check("cudaStreamBeginCapture", cudart.cudaStreamBeginCapture(stream, mode))

    def end_capture(self, stream: int) -> int:
        return int(check("cudaStreamEndCapture", cudart.cudaStreamEndCapture(stream)))

    def is_capturing(self, stream: int) -> bool:
        status = check("cudaStreamIsCapturing", cudart.cudaStreamIsCapturing(stream))
        return bool(status != cudart.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone)

    def num_nodes(self, graph: int) -> int:
        # Asked for none of them, it returns how many there are, last; so below.
        return int(check("cudaGraphGetNodes", cudart.cudaGraphGetNodes(cudart.cudaGraph_t(graph)))[-1])

    def edge_types(self, graph: int) -> tuple[int, ...]:
        count = int(check("cudaGraphGetEdges", cudart.cudaGraphGetEdges(cudart.cudaGraph_t(graph)))[-1])
        if count == 0:
            return ()
        edges = check("cudaGraphGetEdges", cudart.cudaGraphGetEdges(cudart.cudaGraph_t(graph), count))
        return tuple(int(edge.type) for edge in edges[2])

    def destroy_graph(self, graph: int) -> None:
        check("cudaGraphDestroy", cudart.cudaGraphDestroy(cudart.cudaGraph_t(graph)))

    def instantiate(self, graph: int) -> int:
        # No flags. Node priorities would be the capture stream's, the lowest; there is no launch from the device; and
        # there are no allocations to free on launch, since torch's own allocator leaves none in a graph.
        return int(check("cudaGraphInstantiate", cudart.cudaGraphInstantiate(cudart.cudaGraph_t(graph), 0)))

    def update(self, executable: int, graph: int) -> bool:
        result = cudart.cudaGraphExecUpdate(cudart.cudaGraphExec_t(executable), cudart.cudaGraph_t(graph))
        if result[0] == cudart.cudaError_t.cudaErrorGraphExecUpdateFailure:
            return False
        check("cudaGraphExecUpdate", result)
        return True

    def upload(self, executable: int, stream: int) -> None:
        check("cudaGraphUpload", cudart.cudaGraphUpload(cudart.cudaGraphExec_t(executable), stream))

    def destroy_executable(self, executable: int) -> None:
        check("cudaGraphExecDestroy", cudart.cudaGraphExecDestroy(cudart.cudaGraphExec_t(executable)))

    def launcher(self, executable: int, current_stream: Callable[[], int]) -> Callable[[], None]:
        launch = cudart.cudaGraphLaunch
        handle = cudart.cudaGraphExec_t(executable)
        streams = self._streams

        def replay() -> None:
            result = launch(handle, streams[current_stream()])
            if result[0]:
                check("cudaGraphLaunch", result)

        return replay

    def free_bytes(self) -> int:
        free, _total = check("cudaMemGetInfo", cudart.cudaMemGetInfo())
        return int(free)


class _Streams(dict[int, Any]):
    """Stream objects by handle, made when first asked for: making one at every launch would cost more than the lookup."""

    def __missing__(self, handle: int) -> Any:
        if len(self) >= MAX_STREAM_OBJECTS:
            self.clear()
        stream = self[handle] = cudart.cudaStream_t(handle)
        return stream


def check(call: str, result: tuple[Any, ...]) -> Any:
    """What the call returned beside its code: nothing, one thing, or a tuple. Raises CudaCallError."""
    code, *values = result
    if code != cudart.cudaError_t.cudaSuccess:
        raise CudaCallError(call, int(code), code.name)
    return values[0] if len(values) == 1 else tuple(values)
