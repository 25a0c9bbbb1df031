"""The real daemon over an engine without a model, in a process of its own, with a trace of what passed through it.

`python -m benchmarks.wire.daemon_child --socket PATH --step-ms 3 --trace FILE`. Steps run in a thread of their own that sleeps
for as long as a step takes, so that they cost the ways to a thread and back, as those of a GPU do. It ends on SIGTERM like
any daemon, and writes its trace then: for each request when it was at which place.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.wire.trace import RESULT, STEP, WORK, Stamps, Trace
from graphcache import Clock
from hotgraph_client import Client, HotgraphError
from hotgraph_server.batch import Batch, StepOutput
from hotgraph_server.config import ServerSettings, Settings
from hotgraph_server.daemon import Parts, serve
from hotgraph_server.engine.fake import FakeEngine
from hotgraph_server.text import ByteTokenizer
from hotgraph_server.threads import in_daemon_thread, run_event_loop

START_SECONDS = 60.0
STOP_SECONDS = 30.0


Step = tuple[Batch, list[int | None], list[int], "asyncio.Future[StepOutput]"]


class ThreadEngine(FakeEngine):
    """A FakeEngine whose steps pass in a thread, as those of a GPU do: not on the event loop, with nothing between.

    It is for requests that end well: it fails no rows and knows no log-probabilities.
    """

    def __init__(self, seconds: float, trace: Trace, clock: Clock) -> None:
        """`seconds`: how long the thread sleeps for a step. Another step may wait meanwhile, as on a GPU."""
        super().__init__(clock=clock, run_ahead=1)
        self._seconds = seconds
        self._trace = trace
        self._steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve_steps, name="forward", daemon=True)

    async def start(self) -> None:
        await super().start()
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def step(self, batch: Batch) -> asyncio.Future[StepOutput]:
        self._trace.mark(STEP)
        future: asyncio.Future[StepOutput] = self._loop.create_future()
        self._checker.check(batch)
        token_ids, failed_rows = self._sample(batch)
        self._steps.put((batch, token_ids, failed_rows, future))
        return future

    def _serve_steps(self) -> None:
        chooser = self._chooser
        assert chooser is not None
        while (step := self._steps.get()) is not None:
            self._trace.mark(WORK)
            batch, token_ids, failed_rows, future = step
            choice = chooser.choose(batch)
            chooser.launched()
            if self._seconds:
                time.sleep(self._seconds)
            receipt = chooser.finish(batch, choice, self._seconds)
            output = StepOutput(batch.step, token_ids, receipt, (), failed_rows)
            self._trace.mark(RESULT)
            self._loop.call_soon_threadsafe(self._settle, future, output)

    @staticmethod
    def _settle(future: asyncio.Future[StepOutput], output: StepOutput) -> None:
        if not future.done():  # the scheduler was ended meanwhile
            future.set_result(output)

    async def close(self) -> None:
        self._steps.put(None)
        await in_daemon_thread(self._thread.join)
        await super().close()


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until told to end, writes the trace, and returns the daemon's exit status."""
    parser = argparse.ArgumentParser(description="The daemon over an engine without a model, traced.")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--awake-cores", type=int, default=0)
    arguments = parser.parse_args(argv)
    trace = Trace()
    trace.install()
    settings = Settings(server=ServerSettings(listen=(f"unix:{arguments.socket}",), awake_cores=arguments.awake_cores))

    async def build(settings: Settings, clock: Clock) -> Parts:
        return Parts(ThreadEngine(arguments.step_ms / 1e3, trace, clock), ByteTokenizer(), "fake")

    status = int(run_event_loop(serve(settings, build=build)))
    arguments.trace.write_text(json.dumps(trace.requests), encoding="utf-8")
    return status


@dataclass(frozen=True, slots=True)
class TracedDaemon:
    """A daemon that serves at `target`; `process_id` is its process. `stamps` are there once it has ended."""

    target: str
    process_id: int
    stamps: list[Stamps]


@contextlib.contextmanager
def traced_daemon(step_seconds: float, num_awake_cores: int = 0) -> Iterator[TracedDaemon]:
    """Such a daemon as a child of this process, serving; ends it and reads its trace.

    Raises RuntimeError when it does not come to serve, or ends with an error.
    """
    with tempfile.TemporaryDirectory(prefix="hotgraph-wire-") as folder:
        socket, trace = Path(folder) / "wire.sock", Path(folder) / "trace.json"
        command = [sys.executable, "-m", "benchmarks.wire.daemon_child", "--socket", str(socket), "--trace", str(trace)]
        command += ["--step-ms", str(step_seconds * 1e3), "--awake-cores", str(num_awake_cores)]
        paths = [str(Path(__file__).parents[2]), *sys.path]  # the child finds what this process found
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        with subprocess.Popen(command, env=environment) as child:
            daemon = TracedDaemon(f"unix:{socket}", child.pid, [])
            try:
                _wait_until_serving(child, daemon.target, socket)
                yield daemon
            finally:
                child.send_signal(signal.SIGTERM)
                try:
                    status = child.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    raise RuntimeError("the daemon did not end") from None
        if status != 0:
            raise RuntimeError(f"the daemon ended with status {status}")
        daemon.stamps.extend(json.loads(trace.read_text(encoding="utf-8")))


def _wait_until_serving(child: subprocess.Popen[bytes], target: str, socket: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RuntimeError(f"the daemon ended with status {child.returncode} before it served")
        if socket.exists():
            try:
                with Client(target) as client:
                    client.get_model(timeout=5.0)
                return
            except HotgraphError:
                pass  # it listens before its model is there
        time.sleep(0.1)
    raise RuntimeError("the daemon did not come to serve")


if __name__ == "__main__":
    sys.exit(main())
