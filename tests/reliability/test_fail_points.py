"""Failures where nobody expects them: at twelve points inside the daemon something is raised, memory is out, time passes, or
the process dies. What callers see and how the process ends must be as the catalogue says, and of all but a death that it
cannot tell of, the daemon's metrics and one line of its log must tell.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from hotgraph.v1.graph_pb2 import GRAPH_STATE_READY
from hotgraph.v1.graph_service_pb2 import EvictGraphRequest, ListGraphsRequest
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.config import MetricsSettings
from tests.integration.harness import PATIENCE_SECONDS, Caller, WireError, eventually, wire_error
from tests.reliability.fail_points import ACTIONS, POINTS, arm, is_armed, program
from tests.reliability.victims import is_free, victim
from tests.server.observability.scraping import Answer, scrape

NUM_STREAMS: Final = 4
NUM_TOKENS: Final = 150
SECTIONS: Final = {"metrics": MetricsSettings(listen=("127.0.0.1:0",))}

# A failed daemon is gone within milliseconds once nobody is left to be told: for a scrape it stays the second that it may.
SLOW_END: Final = "server.RpcServer.wait_idle = lambda self: __import__('asyncio').sleep(60)"


@dataclass(frozen=True)
class Told:
    """How operators hear of it: a metric that goes up, and the words of one line; none where nothing has gone wrong."""

    metric: str
    words: str
    labels: Mapping[str, str] = field(default_factory=dict)
    at_least: float = 1.0

    def level(self, page: Answer) -> float:
        """What the metric stands at; of a histogram of seconds, how often it was over a quarter of one."""
        if self.metric.endswith("lag_seconds"):
            return page.value(f"{self.metric}_count") - page.value(f"{self.metric}_bucket", le="0.25")
        return page.value(self.metric, **self.labels)


def told(point: str, action: str) -> Told:
    """Of a daemon that was not killed: that one says nothing more, and its successor does (`test_poison.py`)."""
    _, reach = POINTS[point]
    if action == "sleep" and reach == "none":  # a capture took longer, which it may
        return Told("hotgraph_graph_stall_seconds_total", "", at_least=0.4)
    if action == "sleep":
        return Told("hotgraph_event_loop_lag_seconds", "the event loop was blocked")
    if reach == "none":
        what = "capturing" if point == "capture_begin" else "publishing"
        return Told("hotgraph_graph_capture_failures_total", f"graphcache:{what}")
    if reach == "call":
        return Told("hotgraph_rpc_errors_total", "failed, incident", {"reason": "INTERNAL"})
    return Told("hotgraph_failed", "the engine failed")


async def is_serving(caller: Caller) -> bool:
    response = await caller.health.Check(health_pb2.HealthCheckRequest())
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def read(call: Any) -> int | WireError:
    """How many tokens came to the end of a stream, or what it failed with."""
    num_tokens = 0
    try:
        async for event in call:
            num_tokens += len(event.tokens.token_ids)
    except grpc.aio.AioRpcError as error:
        return wire_error(error)
    return num_tokens


async def is_counted(sign: Told, metrics: str, before: float) -> bool:
    """Whether the metric has gone up. A scrape that the daemon's end cuts off says nothing."""
    try:
        return sign.level(await scrape(metrics)) >= before + sign.at_least
    except OSError:
        return False


async def provoke(point: str, caller: Caller) -> WireError | None:
    """Does what leads through the point: a request of a new shape, which is captured, then a graph is thrown out."""
    try:
        await caller.inference.Complete(CompleteRequest(text="y" * 90, max_tokens=3), timeout=PATIENCE_SECONDS)
        if point == "evict":
            graphs = await caller.graphs.ListGraphs(ListGraphsRequest())
            ready = [graph.name for graph in graphs.graphs if graph.state == GRAPH_STATE_READY]
            await caller.graphs.EvictGraph(EvictGraphRequest(name=ready[0]))
    except grpc.aio.AioRpcError as error:
        return wire_error(error)
    return None


async def strike(point: str, action: str) -> None:
    """One failure under four streams, and all that must hold of it: what callers see, what operators are told, what is left."""
    _, reach = POINTS[point]
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        flags = Path(folder)
        async with (
            victim(more=program(flags, [point]) + SLOW_END, sections=SECTIONS) as daemon,
            Caller(daemon.address) as caller,
            Caller(daemon.address) as other,
        ):
            assert await is_serving(caller)
            calls = [
                caller.inference.Generate(GenerateRequest(text="x", max_tokens=NUM_TOKENS)) for _ in range(NUM_STREAMS)
            ]
            streams = [asyncio.create_task(read(call)) for call in calls]
            await asyncio.sleep(0.2)
            metrics = (await daemon.process.logged("metrics on")).rpartition(" ")[2]
            sign = told(point, action)
            before = sign.level(await scrape(metrics))
            assert not sign.words or not any(sign.words in line for line in daemon.process.log)
            arm(flags, point, action)
            begin = time.monotonic()
            error = await provoke(point, other)
            outcomes = await asyncio.wait_for(asyncio.gather(*streams), PATIENCE_SECONDS)
            await eventually(lambda: not is_armed(flags, point))  # it was reached
            seconds = time.monotonic() - begin
            assert any(isinstance(outcome, WireError) for outcome in (*outcomes, error)) or (
                action == "sleep" or reach == "none"
            )
            if action != "kill":
                await eventually(lambda: is_counted(sign, metrics, before))
            failures = [outcome for outcome in (*outcomes, error) if isinstance(outcome, WireError)]
            assert not any("secret" in failure.message for failure in failures)
            if action == "kill":
                assert await daemon.process.ended() == -9
                assert {failure.code for failure in failures} == {grpc.StatusCode.UNAVAILABLE}
                assert len(failures) >= NUM_STREAMS
            elif action == "sleep" or reach == "none":
                assert not failures, failures
                assert outcomes == [NUM_TOKENS] * NUM_STREAMS
            elif reach == "call":
                assert [(failure.code, failure.reason) for failure in failures] == [
                    (grpc.StatusCode.INTERNAL, "INTERNAL")
                ]
                assert failures[0].metadata["incident"]
            else:
                assert await daemon.process.ended() == 70
                assert [outcome for outcome in outcomes if not isinstance(outcome, WireError)] == []
                # Who comes when the listener is closed already has no more than UNAVAILABLE.
                assert {failure.code for failure in failures} == {grpc.StatusCode.UNAVAILABLE}
                assert {o.reason for o in outcomes if isinstance(o, WireError)} == {"ENGINE_FAILED"}
                assert all(o.retry_seconds and o.pushback_ms for o in outcomes if isinstance(o, WireError))
                assert seconds < 5
            if sign.words and action != "kill":
                await daemon.process.logged(sign.words)
                assert sum(sign.words in line for line in daemon.process.log) == 1
            if daemon.process.process.returncode is None:
                assert await is_serving(caller)
                await is_free(caller)
                await caller.check_alive()


# One of each kind that differs in CI; all of them in make test-soak.
@pytest.mark.parametrize(
    ("point", "action"),
    [
        ("step", "raise"),
        ("detokenise", "memory"),
        ("capture_begin", "memory"),
        ("receive", "raise"),
        ("alloc", "raise"),
        ("graph_swap", "kill"),
    ],
)
async def test_failure_ends_as_stated(point: str, action: str) -> None:
    """Callers see what the catalogue says, in time; who survives serves on with everything free."""
    await strike(point, action)


@pytest.mark.soak
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("point", POINTS)
async def test_every_failure_ends_as_stated(point: str, action: str) -> None:
    """All twelve points, four actions each."""
    await strike(point, action)


async def test_a_failure_that_does_not_happen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: where the point does nothing, the test of it fails."""
    monkeypatch.setitem(ACTIONS, "raise", "pass")
    with pytest.raises((AssertionError, TimeoutError)):
        await strike("receive", "raise")
