"""The backend that captures CUDA graphs while others serve. It knows how to record safely, and nothing of keys or budgets.

Torch's own way of capturing is made for the start of a program: it waits for the whole device, empties caches, marks the
random generator for all threads, and leaves that mark, and the allocator's, behind when a capture fails. So work is recorded
here with the runtime's own calls, which disturb no other thread, and torch is told one thing only: to take this thread's
memory from a pool meanwhile.

Two streams of its own, because cuBLAS keeps a workspace for each thread and stream, and a graph points at the workspace of
the stream it was recorded on. All graphs share the capture stream's, which is made before the first capture, outside any
pool, and used by nothing but replays; eager work of a program's `bind` goes to the other stream. For the same reason graphs
of one backend must be replayed one after the other, on one stream or ordered by events.

Imports torch and cuda-bindings, and so is not imported by `graphcache` itself.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, NoReturn

from graphcache.backends.cuda_captured import CudaCaptured
from graphcache.backends.cuda_executables import Executables, leave
from graphcache.backends.cuda_gap import StepGap
from graphcache.backends.cuda_runtime import OUT_OF_MEMORY, CudaCallError, CudaRuntime, Runtime
from graphcache.backends.cuda_spares import Executable
from graphcache.backends.cuda_torch import Torch, TorchDevice
from graphcache.errors import CaptureError, DeviceLostError, GraphStateError
from graphcache.interface import NoTurns, Turns

if TYPE_CHECKING:
    import torch

log = logging.getLogger("graphcache")


@dataclass(frozen=True, slots=True)
class CudaStats:
    """Counts since the start, and what is held beside the cache's ledger: spares, and the pool that graphs share.

    `num_updates` captures took over a spare executable, `num_instantiates` made a new one.
    """

    num_updates: int
    num_instantiates: int
    num_failures: int
    num_spares: int
    spare_bytes: int
    pool_bytes: int
    node_bytes: float


class CudaBackend:
    """Captures on one thread, which `start` makes its own; only what a capture's `replay` does is for others.

    - device: as torch takes it; None is the first.
    - num_spare_execs: executables of destroyed graphs kept to be updated by later captures of the same topology. An update
      takes microseconds where an instantiate takes milliseconds, and memory of a destroyed executable comes back late.
    - library_warm_up: run once on the capture stream before the first capture, beside what is done for cuBLAS: for other
      libraries that keep memory for each thread and stream.
    - runtime, torch_device: stand-ins, for tests.
    """

    name = "cuda"
    is_fixed_shape = True
    needs_verification = True

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        *,
        num_spare_execs: int = 8,
        library_warm_up: Callable[[], None] | None = None,
        runtime: Runtime | None = None,
        torch_device: Torch | None = None,
    ) -> None:
        self._library_warm_up = library_warm_up
        self._runtime: Runtime = runtime if runtime is not None else CudaRuntime()
        self._torch: Torch = torch_device if torch_device is not None else TorchDevice(device)
        self._thread: int | None = None  # the capture thread's, from start to close
        self._capture_stream: int | None = None  # None: it could not be brought back after a failure, and is made anew
        self._warm_up_stream: int | None = None  # likewise
        self._turns: Turns = NoTurns()
        self._part_seconds = 0.0  # of the part that is under way, about
        self._is_recording = False
        self._paused_seconds = 0.0  # of the recording that is under way
        self._end_part: Callable[[], None] | None = None  # how the part that is under way ends
        self._executables = Executables(self._runtime, self._torch, num_spare_execs)
        self._gap = StepGap(self._runtime)
        self._num_failures = 0
        self._pool_bytes = 0

    def __repr__(self) -> str:
        return f"CudaBackend({'not started' if self._thread is None else 'started'}, {self._executables!r})"

    @property
    def pool_bytes(self) -> int:
        """See Backend. From any thread; what rehearsals share is not in it."""
        return self._pool_bytes

    def stats(self) -> CudaStats:
        """From any thread; the parts may be of slightly different moments."""
        executables = self._executables
        spares = executables.spares.all()
        return CudaStats(
            num_updates=executables.num_updates,
            num_instantiates=executables.num_instantiates,
            num_failures=self._num_failures,
            num_spares=len(spares),
            spare_bytes=sum(spare.size_bytes for spare in spares),
            pool_bytes=self._pool_bytes,
            node_bytes=executables.sizes.node_bytes,
        )

    # Its life.

    def start(self, turns: Turns) -> None:
        """See Backend. Makes the streams and the pool, has cuBLAS allocate its workspaces, and waits for that."""
        self._turns = turns
        try:
            self._torch.open()
            self._gap.open(self._torch.current_stream())
            self._ensure_warm_up_stream()
            self._ensure_capture_stream()
        except Exception as error:
            try:
                self._fail("starting", error)
            finally:
                self._let_go()
        self._thread = threading.get_ident()

    def close(self) -> None:
        """Destroys the spares, and lets go of the streams and the pool. Graphs in use must not be left."""
        self._check_thread()
        self._let_go()

    def _let_go(self) -> None:
        try:
            if self._warm_up_stream is not None:
                self._runtime.synchronize_stream(self._warm_up_stream)
        except CudaCallError:
            self._torch.keep_pool()  # on a lost device, which nobody may have noticed yet, giving it back would abort
        for event in self._gap.close():
            leave("an event", self._runtime.destroy_event, event)
        for spare in self._executables.spares.clear():
            leave("an executable", self._runtime.destroy_executable, spare.handle)
        for stream in (self._capture_stream, self._warm_up_stream):
            if stream is not None:
                leave("a stream", self._runtime.return_stream, stream)
        self._torch.close()
        self._capture_stream = self._warm_up_stream = self._thread = None
        self._pool_bytes = 0

    def _ensure_warm_up_stream(self) -> int:
        if self._warm_up_stream is None:
            self._warm_up_stream = self._runtime.take_stream()
        return self._warm_up_stream

    def _ensure_capture_stream(self) -> int:
        """The capture stream, made and warmed if need be: eager work runs on it here and nowhere else."""
        if self._capture_stream is None:
            stream = self._runtime.take_stream()
            try:
                with self._torch.on_stream(stream):
                    self._torch.warm_libraries()
                    if self._library_warm_up is not None:
                        self._library_warm_up()
                self._runtime.synchronize_stream(stream)
            except BaseException:
                self._runtime.return_stream(stream)
                raise
            self._capture_stream = stream
        return self._capture_stream

    # Those who are served.

    def before_step(self) -> None:
        """See Backend."""
        self._gap.before_step()

    def after_step(self) -> None:
        """See Backend."""
        self._gap.after_step()

    # Its work.

    def warm_up(self, work: Callable[[], None]) -> None:
        """See Backend. Runs on a stream of its own, of low priority, without gradients; waits for that stream alone.

        What `work` reads must be complete on the device: this stream is behind no other.
        """
        self._check_thread()
        try:
            stream = self._ensure_warm_up_stream()

            def end_part() -> None:
                self._finish_part(stream)
                self._gap.enter(stream, self._turns.wait)

            self._gap.enter(stream, self._turns.wait)
            with self._torch.on_stream(stream), self._parted(end_part):
                work()
            self._finish_part(stream)
        except Exception as error:
            self._fail("warming up", error)

    def rehearse(self, work: Callable[[], None]) -> None:
        """See Backend. On the warm-up stream, with its workspaces and memory of a pool of its own: it runs beside graphs."""
        self._check_thread()
        try:
            stream = self._ensure_warm_up_stream()

            def end_part() -> None:
                self._replay_part(stream)
                self._gap.enter(stream, self._turns.wait)
                self._runtime.begin_capture(stream)

            self._gap.enter(stream, self._turns.wait)
            with self._torch.recording(stream, is_rehearsal=True), self._parted(end_part):
                try:
                    self._runtime.begin_capture(stream)
                    work()
                    self._replay_part(stream)
                except BaseException:
                    self._abandon_capture(stream)
                    raise
        except Exception as error:
            self._fail("rehearsing", error)

    def give_way(self, seconds: float = math.inf) -> None:
        """See Backend."""
        if self._end_part is None:
            if self._is_recording:
                self._pause()
            return
        self._part_seconds += seconds
        if self._part_seconds + seconds > self._turns.device_seconds():
            self._part_seconds = 0.0
            self._end_part()

    def _pause(self) -> None:
        """Recording is Python: whoever serves waits for the interpreter's lock beside it. So it stops when they want that."""
        if self._turns.host_seconds() <= 0:
            paused = perf_counter()
            self._turns.wait()
            self._paused_seconds += perf_counter() - paused

    def _finish_part(self, stream: int) -> None:
        """Waits for what is on the stream. The next step goes behind it, if it has a gap to be in."""
        self._gap.leave(stream)
        self._runtime.synchronize_stream(stream)
        self._gap.settle()

    @contextmanager
    def _parted(self, end_part: Callable[[], None]) -> Iterator[None]:
        self._end_part = end_part
        self._part_seconds = 0.0
        try:
            yield
        finally:
            self._end_part = None

    def _replay_part(self, stream: int) -> None:
        """Ends the recording of a part, runs it, and waits for it."""
        graph = self._runtime.end_capture(stream)
        try:
            if self._runtime.num_nodes(graph) == 0:
                return
            executable = self._runtime.instantiate(graph)
            try:
                self._runtime.launcher(executable, lambda: stream)()
                self._finish_part(stream)
            finally:
                self._runtime.destroy_executable(executable)
        finally:
            self._runtime.destroy_graph(graph)

    def capture(self, name: str, work: Callable[[], None]) -> CudaCaptured:
        """See Backend. It waits for its turn between recording, instantiating and uploading, and in a recording where the work
        gives way; that time is not counted."""
        self._check_thread()
        try:
            stream = self._ensure_capture_stream()
            pool_bytes = self._torch.pool_bytes()
            started, self._paused_seconds = perf_counter(), 0.0
            graph = self._record(stream, work)
            record_seconds = perf_counter() - started - self._paused_seconds
        except Exception as error:
            self._num_failures += 1
            self._fail("recording", error, name)
        try:
            self._pause()
            executable, instantiate_seconds, is_update = self._executables.make(graph, stream, self._pause)
        except Exception as error:
            self._num_failures += 1
            self._fail("instantiating", error, name)
        finally:
            leave("a graph", self._runtime.destroy_graph, graph)  # the executable needs it no more
        self._pool_bytes = self._torch.pool_bytes()
        return CudaCaptured(
            executable,
            self._runtime.launcher(executable.handle, self._torch.current_stream()),
            self._retire,
            pool_bytes=max(0, self._pool_bytes - pool_bytes),
            record_seconds=record_seconds,
            instantiate_seconds=instantiate_seconds,
            is_update=is_update,
        )

    def _retire(self, executable: Executable) -> None:
        """A capture that is being destroyed gives its executable back. Raises CudaCallError when one cannot be destroyed."""
        self._check_thread()
        self._executables.spares.add(executable)

    def _record(self, stream: int, work: Callable[[], None]) -> int:
        """The graph of `work`. Raises whatever `work` raises, or CudaCallError; the stream does not capture then."""
        # The pool takes over before the capture begins, and until after it ended: the allocator must not be asked for
        # memory outside it in between.
        with self._torch.recording(stream):
            try:
                self._runtime.begin_capture(stream)
                self._is_recording = True
                work()
                graph = self._runtime.end_capture(stream)
            except BaseException:
                self._abandon_capture(stream)
                raise
            finally:
                self._is_recording = False
        return graph

    def _abandon_capture(self, stream: int) -> None:
        """Ends what is left of a capture that failed. A stream that goes on capturing is given up for another."""
        try:
            if self._runtime.is_capturing(stream):
                self._runtime.destroy_graph(self._runtime.end_capture(stream))
        except CudaCallError as error:
            log.debug("the end of a broken capture: %s", error)  # which is how it is told; the next question counts
        try:
            is_capturing = self._runtime.is_capturing(stream)
        except CudaCallError:
            is_capturing = True
        if is_capturing:
            log.warning("a stream cannot be used any more, as its capture does not end; the next capture makes another")
            if stream == self._capture_stream:
                self._capture_stream = None
            else:
                self._warm_up_stream = None

    # What goes wrong.

    def _fail(self, doing: str, error: Exception, name: str = "") -> NoReturn:
        """Raises for `error` what the cache understands: DeviceLostError when the device answers nothing any more, else a
        CaptureError with fixed words; the error itself goes to the log."""
        self._torch.clear_last_error()
        try:
            # Idle, but for a warm-up that just failed. A device that is lost answers this with what it was lost to.
            if self._warm_up_stream is not None:
                self._runtime.synchronize_stream(self._warm_up_stream)
        except CudaCallError as lost:
            self._torch.keep_pool()
            log.warning("%s %s failed", doing, name, exc_info=error)
            raise DeviceLostError(f"the device is lost: {lost.code_name}") from error
        if isinstance(error, CaptureError):
            raise error
        log.warning("%s %s failed", doing, name, exc_info=error)
        if self._torch.is_out_of_memory(error) or (isinstance(error, CudaCallError) and error.code == OUT_OF_MEMORY):
            text = "out of device memory"
        elif isinstance(error, CudaCallError):
            text = f"{error}: what is captured must not wait, nor fork to a stream that does not join again"
        else:
            text = f"{doing} raised {type(error).__name__}; the log has it"
        raise CaptureError(text) from error

    def _check_thread(self) -> None:
        if self._thread != threading.get_ident():
            raise GraphStateError("the CUDA backend is not started, or was called away from the capture thread")
