"""Failures where nobody expects them: at twelve points inside the daemon something is raised, memory is out, time passes, or
the process dies. What callers see and how the process ends must be as the catalogue says.

The points are wrapped round the daemon's own functions by the test's program: what is shipped has none, and nothing to refuse.
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
from tests.reliability.victims import is_free, victim

SERVER: Final = "hotgraph_server"
NUM_STREAMS: Final = 4
NUM_TOKENS: Final = 150

# Where, and whom a failure there reaches: "all" in flight, as the engine or the scheduler is beyond use; the one "call"; or
# "none", as it is in the background.
POINTS: Final = {
    "prefill": (f"{SERVER}.scheduler.planner:Planner._plan_prefill", "all"),
    "step": (f"{SERVER}.engine.fake:FakeEngine._run_step", "all"),
    "sampling": (f"{SERVER}.engine.fake:FakeEngine._sample", "all"),
    "capture_begin": ("graphcache.backends.eager:EagerBackend.capture", "none"),
    "capture_end": ("graphcache.task:CaptureTask._publish", "none"),
    "graph_swap": ("graphcache.store:GraphStore.publish", "none"),
    "evict": ("graphcache.store:GraphStore.evict", "call"),
    "alloc": (f"{SERVER}.scheduler.blocks:BlockManager.open", "all"),
    "free": (f"{SERVER}.scheduler.blocks:BlockManager.close", "all"),
    "detokenise": (f"{SERVER}.scheduler.detokenizer:Detokenizer.push", "all"),
    "send": (f"{SERVER}.scheduler.stream:RequestStream.put", "all"),
    "receive": (f"{SERVER}.scheduler.stream:RequestStream.__anext__", "call"),
}
ACTIONS: Final = {
    "raise": "raise RuntimeError('secret words of a failure')",
    "memory": "raise MemoryError",
    "sleep": "time.sleep(0.5)",
    "kill": "os.kill(os.getpid(), 9)",
}

# The point fires once, at the first call after its file is there.
FAIL_POINT: Final = """
import functools, os, time

def fail_once(path, flag):
    module, _, name = path.partition(":")
    kind, _, method = name.partition(".")
    owner = getattr(importlib.import_module(module), kind)
    own = getattr(owner, method)

    @functools.wraps(own)
    def failing(*args, **kwargs):
        try:
            os.unlink(flag)
        except FileNotFoundError:
            return own(*args, **kwargs)
        {action}
        return own(*args, **kwargs)

    setattr(owner, method, failing)

fail_once({path!r}, {flag!r})
"""


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
    path, reach = POINTS[point]
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        flag = Path(folder, "fail")
        more = FAIL_POINT.format(path=path, flag=str(flag), action=ACTIONS[action])
        async with victim(more=more) as daemon, Caller(daemon.address) as caller, Caller(daemon.address) as other:
            assert await is_serving(caller)
            calls = [
                caller.inference.Generate(GenerateRequest(text="x", max_tokens=NUM_TOKENS)) for _ in range(NUM_STREAMS)
            ]
            streams = [asyncio.create_task(read(call)) for call in calls]
            await asyncio.sleep(0.2)
            flag.touch()  # noqa: ASYNC240  (an empty file in memory)
            begin = time.monotonic()
            error = await provoke(point, other)
            outcomes = await asyncio.wait_for(asyncio.gather(*streams), PATIENCE_SECONDS)
            await eventually(lambda: not flag.exists())  # it was reached
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
