"""Every fault moves a metric and leaves one line in the log that names it, and both are those of docs/observability.md.

The daemon runs in this process, with the log of `hotgraph serve`; one that runs out of file descriptors in its own. Where there
is a Prometheus its alerts are asked, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from graphcache import CaptureError, DeviceLostError, FakeBackend
from graphcache.backends.fake import FakeCaptured
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server import logs
from hotgraph_server.config import LoggingSettings, MetricsSettings
from hotgraph_server.daemon import daemon as daemon_module
from hotgraph_server.engine import FakeEngine
from hotgraph_server.engine import fake as fake_engine
from hotgraph_server.rpc import RpcServer
from tests.integration.harness import PATIENCE_SECONDS, Caller, Serving, eventually, letters, refused, serving
from tests.integration.prometheus import fires, needs_prometheus, prometheus
from tests.reliability.victims import Victim, victim
from tests.server.observability.scraping import Answer, scrape

ROOT: Final = Path(__file__).parents[2]
METRICS_ON: Final = MetricsSettings(listen=("127.0.0.1:0",))
NUM_BLOCKS: Final = 24  # of 16 positions: three sequences of 200 do not fit
FILE_LIMIT: Final = 200
GREETING: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # and no settings

Provoke = Callable[[Serving], Awaitable[None]]


class FickleBackend(FakeBackend):
    """Captures, or raises what it is told to."""

    error: Exception | None = None

    def capture(self, name: str, work: Callable[[], None]) -> FakeCaptured:
        if self.error is not None:
            raise self.error
        return super().capture(name, work)


class StallingStream(io.StringIO):
    """A reader of the log that stops for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()
        self.goes_on.set()

    def write(self, text: str) -> int:
        self.goes_on.wait(30.0)
        return super().write(text)


@dataclass
class Watched:
    """A daemon, what it logs and what it counts."""

    served: Serving
    stream: StallingStream

    def events(self, text: str, **fields: str) -> list[dict[str, Any]]:
        """Lines that hold the text and have these fields."""
        lines = [json.loads(line) for line in self.stream.getvalue().splitlines()]
        return [line for line in lines if text in line["event"] and fields.items() <= line.items()]

    async def page(self) -> Answer:
        return await scrape(self.served.daemon.observability.addresses[0])


def made(**changes: Any) -> FakeEngine:
    """An engine with few blocks, whose captures can be made to fail."""
    usual: dict[str, Any] = {"rule": letters, "step_seconds": 0.002, "num_blocks": NUM_BLOCKS + 1}
    return FakeEngine(**(usual | {"backend": FickleBackend()} | changes))


@asynccontextmanager
async def watched(**changes: Any) -> AsyncIterator[Watched]:
    stream = StallingStream()
    with logs.logging_to(LoggingSettings(level="info", format="json"), stream):
        try:
            async with serving(metrics=METRICS_ON, **changes) as served:
                yield Watched(served, stream)
        finally:
            stream.goes_on.set()


async def complete(served: Serving, max_tokens: int = 4, text: str = "hello", **arguments: Any) -> None:
    await served.inference.Complete(CompleteRequest(text=text, max_tokens=max_tokens), **arguments)


# How each fault is provoked.


async def flood(served: Serving) -> None:
    """Of four one runs, two wait and the last is refused."""
    calls = [served.inference.Complete(CompleteRequest(text="hello", max_tokens=100)) for _ in range(4)]
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(end, Exception) for end in ends) == 1


async def break_logits(served: Serving) -> None:
    served.engine.fail_rows(len(served.engine.batches), [0])
    await refused(complete(served))


async def ask_badly(served: Serving) -> None:
    await refused(complete(served, 0))


async def come_without_token(served: Serving) -> None:
    await refused(complete(served))


async def run_out_of_time(served: Serving) -> None:
    request = CompleteRequest(text="hello", max_tokens=300)
    request.timeout.nanos = 50_000_000
    await refused(served.inference.Complete(request))


async def leave(served: Serving) -> None:
    call = served.inference.Generate(GenerateRequest(text="hello", max_tokens=300))
    async for event in call:
        if event.HasField("tokens"):
            break
    call.cancel()
    await eventually(served.is_all_free)


async def crowd(served: Serving) -> None:
    """Two of which the blocks hold no more than one to its end."""
    await asyncio.gather(complete(served, 200, "x" * 16), complete(served, 200, "y" * 16))
    assert served.scheduler.status().num_preemptions == 1


async def fail_capture(served: Serving) -> None:
    backend = backend_of(served)
    backend.error = CaptureError("asked for")
    await complete(served, 1, "x" * 90)
    await eventually(lambda: served.engine.graphs.stats().num_failures == 1)


async def break_graph(served: Serving) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_engine._FakeProgram, "verify", lambda *_: False)
        await complete(served, 1, "x" * 90)
        await eventually(lambda: served.engine.graphs.stats().num_quarantines == 1)


async def report_graph(served: Serving) -> None:
    """As a check of steps against their graphs would do it."""
    cache = served.engine.graphs
    await eventually(cache.list)
    graph = cache.lookup(cache.list()[0].key)
    assert graph is not None
    assert cache.report_failure(graph, "asked for")


async def block_loop(served: Serving) -> None:
    await asyncio.sleep(0.3)  # a beat first
    time.sleep(0.6)  # noqa: ASYNC251  (that is the fault)
    await asyncio.sleep(0.3)


async def drain(served: Serving) -> None:
    served.engine.hold_step(len(served.engine.batches))
    running = asyncio.ensure_future(complete(served))
    await served.engine.wait_held()
    served.daemon.drain(5.0)
    running.add_done_callback(lambda done: done.cancelled() or done.exception())


def backend_of(served: Serving) -> FickleBackend:
    backend = served.engine.graphs.backend
    assert isinstance(backend, FickleBackend)
    return backend


@dataclass(frozen=True)
class Fault:
    """`row`: of the table of faults in the docs. `metric` goes up by one, `event` is logged once, with `fields`."""

    row: str
    provoke: Provoke
    metric: str
    event: str
    labels: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)


def call_ended(row: str, provoke: Provoke, metric: str, reason: str, **more: Any) -> Fault:
    """One that the caller hears of as `reason`."""
    return Fault(row, provoke, metric, "call ended", fields={"reason": reason}, **more)


ENDED: Final = "hotgraph_requests_ended_total"
ERRORS: Final = "hotgraph_rpc_errors_total"
FAULTS: Final = {
    "drain": Fault("loading, draining for long", drain, "hotgraph_state", "draining, for", {"state": "draining"}),
    "flood": call_ended(
        "queue full",
        flood,
        "hotgraph_requests_rejected_total",
        "QUEUE_FULL",
        engine={"num_slots": 1},
        scheduler={"max_waiting": 2},
    ),
    "logits": Fault(
        "an exception, logits that are not finite", break_logits, ERRORS, ", incident ", {"reason": "INTERNAL"}
    ),
    "bad": call_ended(
        "bad requests, of any kind", ask_badly, ERRORS, "INVALID_REQUEST", labels={"reason": "INVALID_REQUEST"}
    ),
    "token": Fault("no or wrong credentials", come_without_token, ERRORS, "refused to", {"reason": "UNAUTHENTICATED"}),
    "deadline": call_ended(
        "deadlines pass", run_out_of_time, ENDED, "DEADLINE_EXCEEDED", labels={"reason": "deadline_exceeded"}
    ),
    "leave": Fault("callers leave", leave, ENDED, "call ended", {"reason": "cancelled"}, fields={"code": "CANCELLED"}),
    "blocks": Fault("KV blocks run out", crowd, "hotgraph_preemptions_total", "preempted: KV blocks ran out"),
    "capture": Fault("a capture fails", fail_capture, "hotgraph_graph_capture_failures_total", "capturing "),
    "graph": Fault("a graph gives wrong results", break_graph, "hotgraph_graph_quarantines_total", "is quarantined"),
    "report": Fault("a graph gives wrong results", report_graph, "hotgraph_graph_quarantines_total", "is quarantined"),
    "loop": Fault(
        "event loop blocked",
        block_loop,
        "hotgraph_event_loop_lag_seconds",
        "the event loop was blocked",
        {"over": "0.25"},
    ),
}


def level(page: Answer, fault: Fault) -> float:
    """What the fault's metric stands at; of a histogram, how many were over the bound."""
    bound = fault.labels.get("over")
    if bound is None:
        return page.value(fault.metric, **fault.labels)
    return page.value(f"{fault.metric}_count") - page.value(f"{fault.metric}_bucket", le=bound)


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_named(name: str, tmp_path: Path) -> None:
    """Its metric has gone up by one, and one line more in the log has its words."""
    fault = FAULTS[name]
    changes: dict[str, Any] = {"engine": made(**fault.engine), "scheduler": dict(fault.scheduler)}
    if name == "token":
        (tmp_path / "tokens").write_text(f"use someone {secrets.token_hex(32)}\n")
        (tmp_path / "tokens").chmod(0o600)
        changes["server"] = {"listen": ("127.0.0.1:0",), "token_file": tmp_path / "tokens"}
    async with watched(**changes) as daemon:
        if name != "token":
            await complete(daemon.served)
        await eventually(lambda: not daemon.served.engine.graphs.stats().num_pending)
        before, num_before = level(await daemon.page(), fault), len(daemon.events(fault.event, **fault.fields))
        assert num_before == 0
        await fault.provoke(daemon.served)

        async def is_counted() -> bool:
            return level(await daemon.page(), fault) == before + 1

        await eventually(is_counted)
        await eventually(lambda: daemon.events(fault.event, **fault.fields))
        await asyncio.sleep(0.1)  # for a second line, which there must not be
        assert len(daemon.events(fault.event, **fault.fields)) == 1


@contextlib.contextmanager
def a_slow_end() -> Iterator[asyncio.Event]:
    """The daemon ends when the event is set: a failed one is gone in milliseconds, and a scrape would have to be lucky."""
    may_end = asyncio.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RpcServer, "wait_idle", lambda _: may_end.wait())
        patch.setattr(daemon_module, "LAST_WORDS_SECONDS", PATIENCE_SECONDS)
        yield may_end


async def lose_device(daemon: Watched) -> None:
    """A capture finds the device gone."""
    backend_of(daemon.served).error = DeviceLostError("asked for")
    await complete(daemon.served, 1, "x" * 90)
    await eventually(lambda: daemon.served.engine.graphs.lost)
    await eventually(lambda: daemon.served.daemon.lifecycle.failure)
    assert (await refused(complete(daemon.served))).code is grpc.StatusCode.UNAVAILABLE


async def test_a_lost_device_is_named() -> None:
    """Both metrics of it are 1 for as long as the process is there, and one line says what was lost, one what follows."""
    with a_slow_end() as may_end:
        async with watched(engine=made()) as daemon:
            await lose_device(daemon)
            page = await daemon.page()
            assert page.value("hotgraph_graph_device_lost") == 1
            assert page.value("hotgraph_failed") == 1
            assert len(daemon.events("no capture from now on: asked for", level="critical")) == 1
            assert len(daemon.events("the engine failed", level="critical")) == 1
            may_end.set()


async def stall_log(daemon: Watched) -> int:
    """Nobody reads the log for as long as it takes until lines are lost; then it is read on. Returns how many were lost."""
    daemon.stream.goes_on.clear()
    for _ in range(12):
        await refused(complete(daemon.served, 0))
    await eventually(lambda: logs.log_counts().num_lost > 0)
    num_lost = logs.log_counts().num_lost
    daemon.stream.goes_on.set()
    return num_lost


async def test_a_lost_log_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that nobody read in time are counted, and when the log is read on, one line says how many there were."""
    monkeypatch.setattr(logs, "MAX_QUEUED_LINES", 8)
    async with watched(engine=made()) as daemon:
        num_lost = await stall_log(daemon)
        await eventually(lambda: daemon.events("log lines dropped"))
        assert [line["num_dropped"] for line in daemon.events("log lines dropped")] == [num_lost]
        assert (await daemon.page()).value("hotgraph_log_lines_lost_total") == num_lost


@asynccontextmanager
async def short_of_files() -> AsyncIterator[tuple[Victim, str, list[socket.socket]]]:
    """A daemon that may have few files, of which connections hold more than four in five; where its metrics are; and those."""
    limits = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({FILE_LIMIT}, {FILE_LIMIT}))"
    with contextlib.ExitStack() as stack:
        async with victim(sections={"metrics": METRICS_ON}, more=limits) as daemon:
            metrics = (await daemon.process.logged("metrics on")).rpartition(" ")[2]
            host, _, port = daemon.address.rpartition(":")
            connections = []
            while daemon.num_files <= 0.85 * FILE_LIMIT:
                connections.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=5.0)))
                connections[-1].sendall(GREETING)  # or it would soon be closed
                await asyncio.sleep(0.005)
            yield daemon, metrics, connections


async def test_few_file_descriptors_are_named() -> None:
    """The process's metrics say how many are open and how many may be, one line says that they run out, and one that it is
    over; callers are served all the while."""
    async with short_of_files() as (daemon, metrics, connections), Caller(daemon.address) as caller:
        line = await daemon.process.logged("file descriptors run out")
        page = await scrape(metrics)
        assert page.value("process_max_fds") == FILE_LIMIT
        assert page.value("process_open_fds") > 0.8 * FILE_LIMIT
        assert re.search(rf"\d+ of {FILE_LIMIT} are open", line)
        await caller.check_alive()
        for connection in connections:
            connection.close()
        await daemon.process.logged("file descriptors are to be had again")
        assert sum("file descriptors run out" in line for line in daemon.process.log) == 1


@needs_prometheus
@pytest.mark.slow
async def test_alerts_of_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real Prometheus fires the alerts of preemptions, of a lost log, of a lost device and, of a second daemon, of file
    descriptors, each when it has come to that, and the last no longer when there are enough again."""
    monkeypatch.setattr(logs, "MAX_QUEUED_LINES", 8)
    async with contextlib.AsyncExitStack() as stack:
        may_end = stack.enter_context(a_slow_end())
        daemon = await stack.enter_async_context(watched(engine=made()))
        _, metrics, connections = await stack.enter_async_context(short_of_files())
        addresses = (*daemon.served.daemon.observability.addresses, metrics)
        server = await stack.enter_async_context(prometheus(tmp_path, *addresses))

        async def are_scraped() -> bool:
            return len(await server.query("hotgraph_requests_total")) == 2

        async def has_files_again() -> bool:
            return "HotgraphFileDescriptors" not in await server.firing()

        await eventually(are_scraped)
        await fires(server, "HotgraphFileDescriptors")
        assert not await server.firing() & {"HotgraphPreemptions", "HotgraphLogLinesLost", "HotgraphEngineFailed"}
        for connection in connections:
            connection.close()
        await asyncio.gather(*(complete(daemon.served, 200, letter * 16) for letter in "abcdef"))
        await stall_log(daemon)
        await fires(server, "HotgraphPreemptions", "HotgraphLogLinesLost")
        await eventually(has_files_again)
        assert "HotgraphEngineFailed" not in await server.firing()
        await lose_device(daemon)
        await fires(server, "HotgraphEngineFailed")
        may_end.set()


# Faults of the docs' table that are provoked elsewhere, or are no events: where.
ELSEWHERE: Final = {
    "process gone, or hung": "tests/systemd/test_service.py",
    "a request that brings the daemon down": "tests/reliability/test_poison.py",
    "slow first tokens, slow tokens": "tests/integration/test_prometheus.py",
    "few replays, captures that hold up": "tests/integration/test_prometheus.py",
}
NAMED: Final = {  # by the tests above that are not of FAULTS
    "engine or device lost": ("hotgraph_graph_device_lost", "no capture from now on"),
    "log not read": ("hotgraph_log_lines_lost_total", "log lines dropped"),
    "file descriptors": ("process_open_fds", "file descriptors run out"),
}


def test_the_table_of_the_docs_is_what_was_provoked() -> None:
    """Each fault of docs/observability.md is provoked here or in a file that there is, and its row has the metric and the
    words of the log that it was found by."""
    text = (ROOT / "docs/observability.md").read_text()
    table = re.search(r"\| fault \| metric .*?\n\n", text, re.DOTALL)
    assert table is not None
    rows = {
        cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in table[0].split("\n")[2:] if line)
    }
    provoked = {(fault.row, fault.metric, fault.event) for fault in FAULTS.values()}
    provoked |= {(row, *words) for row, words in NAMED.items()}
    assert rows.keys() == {row for row, _, _ in provoked} | ELSEWHERE.keys()
    assert all((ROOT / path).exists() for path in ELSEWHERE.values())
    for row, metric, event in provoked:
        metrics, _, log = rows[row]
        assert metric in metrics, row
        assert event.strip(" ,") in log, row
