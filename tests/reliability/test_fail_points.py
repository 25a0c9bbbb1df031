"""Failures where nobody expects them: at twelve points inside the daemon something is raised, memory is out, time passes, or
the process dies. What callers see and how the process ends must be as the catalogue says.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from hotgraph.v1.graph_pb2 import GRAPH_STATE_READY
from hotgraph.v1.graph_service_pb2 import EvictGraphRequest, ListGraphsRequest
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from tests.integration.harness import PATIENCE_SECONDS, Caller, WireError, eventually, wire_error
from tests.reliability.fail_points import ACTIONS, POINTS, arm, is_armed, program
from tests.reliability.victims import is_free, victim

NUM_STREAMS: Final = 4
NUM_TOKENS: Final = 150


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
    """One failure under four streams, and all that must hold of it."""
    _, reach = POINTS[point]
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        flags = Path(folder)
        async with (
            victim(more=program(flags, [point])) as daemon,
            Caller(daemon.address) as caller,
            Caller(daemon.address) as other,
        ):
            assert await is_serving(caller)
            calls = [
                caller.inference.Generate(GenerateRequest(text="x", max_tokens=NUM_TOKENS)) for _ in range(NUM_STREAMS)
            ]
            streams = [asyncio.create_task(read(call)) for call in calls]
            await asyncio.sleep(0.2)
            arm(flags, point, action)
            begin = time.monotonic()
            error = await provoke(point, other)
            outcomes = await asyncio.wait_for(asyncio.gather(*streams), PATIENCE_SECONDS)
            await eventually(lambda: not is_armed(flags, point))  # it was reached
            seconds = time.monotonic() - begin
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
