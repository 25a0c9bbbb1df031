"""GraphService on the real cache behind the fake engine: what it lists has happened, what it is told it does."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from graphcache import CacheSettings, EagerBackend, FakeBackend
from hotgraph.v1 import graph_pb2
from hotgraph.v1.graph_service_pb2 import (
    EvictGraphRequest,
    ExportProfileRequest,
    GetBudgetRequest,
    GetGraphRequest,
    ImportProfileRequest,
    ListGraphsRequest,
    PinGraphRequest,
    PrewarmGraphsRequest,
    UnpinGraphRequest,
    UpdateBudgetRequest,
    WatchGraphsRequest,
)
from hotgraph.v1.inference_service_pb2 import CompleteRequest
from hotgraph_server.batch import Sampler
from hotgraph_server.engine import FakeEngine
from tests.integration.harness import PATIENCE_SECONDS, Serving, eventually, letters, refused, serving, stream_refused

CODE = grpc.StatusCode
GREEDY = graph_pb2.SAMPLER_VARIANT_GREEDY
READY = graph_pb2.GRAPH_STATE_READY
WAIT = Duration(seconds=20)


def keys(*shapes: tuple[int, int]) -> list[graph_pb2.GraphKey]:
    return [graph_pb2.GraphKey(tokens=tokens, rows=rows, sampler=GREEDY) for tokens, rows in shapes]


async def prewarmed(served: Serving, *shapes: tuple[int, int]) -> list[graph_pb2.Graph]:
    response = await served.graphs.PrewarmGraphs(PrewarmGraphsRequest(keys=keys(*shapes), wait=WAIT))
    return list(response.graphs)


async def test_prewarm_raises_to_buckets_and_waits() -> None:
    """Keys become buckets, none twice, in order; with wait they are ready when it answers."""
    async with serving() as served:
        bucket = served.engine.bucket(101, 1, Sampler.GREEDY)
        assert bucket is not None
        assert bucket.tokens > 101
        graphs = await prewarmed(served, (1, 1), (101, 1), (bucket.tokens, bucket.rows), (1, 1))
        assert [graph.name for graph in graphs] == ["graphs/t1-r1-greedy", f"graphs/{bucket}"]
        assert all(graph.state == READY for graph in graphs)
        assert graphs[0].key == keys((1, 1))[0]
        assert graphs[0].HasField("publish_time")
        assert graphs[0].HasField("capture")
        assert not graphs[0].HasField("pin")
        assert graphs[0].segment == graph_pb2.CACHE_SEGMENT_PROBATION


async def test_prewarm_answers_when_its_wait_is_over() -> None:
    """A capture that hangs does not hold the call."""
    backend = FakeBackend()
    engine = FakeEngine(rule=letters, backend=backend)
    async with serving(engine=engine) as served:
        engine.graphs.pause()
        response = await served.graphs.PrewarmGraphs(
            PrewarmGraphsRequest(keys=keys((1, 1)), wait=Duration(nanos=20_000_000))
        )
        assert response.graphs[0].state == graph_pb2.GRAPH_STATE_QUEUED
        engine.graphs.resume()
        await eventually(lambda: engine.graphs.stats().num_ready == 1)


async def test_list_pages_through_everything_once() -> None:
    """Pages of two show every entry once, most hits first; the filter and the total agree."""
    async with serving() as served:
        await prewarmed(served, (1, 1), (2, 2), (4, 4), (8, 8), (16, 1))
        await served.inference.Complete(CompleteRequest(text="x", max_tokens=5))
        first = await served.graphs.ListGraphs(ListGraphsRequest())
        hits = [graph.num_hits for graph in first.graphs]
        assert hits == sorted(hits, reverse=True)
        names, token = [], ""
        while True:
            page = await served.graphs.ListGraphs(ListGraphsRequest(page_size=2, page_token=token))
            assert len(page.graphs) <= 2
            assert page.total_size == first.total_size
            names += [graph.name for graph in page.graphs]
            token = page.next_page_token
            if not token:
                break
        assert names == [graph.name for graph in first.graphs]
        none = await served.graphs.ListGraphs(ListGraphsRequest(states=[graph_pb2.GRAPH_STATE_QUARANTINED]))
        assert (list(none.graphs), none.total_size, none.next_page_token) == ([], 0, "")


async def test_pin_evict_and_their_refusals() -> None:
    """A pinned graph is not evicted; unpinned it is; an evicted one is not evicted again, nor pinned."""
    async with serving() as served:
        name = (await prewarmed(served, (1, 1)))[0].name
        pinned = (await served.graphs.PinGraph(PinGraphRequest(name=name, lease=Duration(seconds=60)))).graph
        lease_seconds = pinned.pin.expire_time.seconds - pinned.publish_time.seconds
        assert 59 <= lease_seconds <= 80
        error = await refused(served.graphs.EvictGraph(EvictGraphRequest(name=name)))
        assert (error.code, error.reason) == (CODE.FAILED_PRECONDITION, "NOT_POSSIBLE")
        unpinned = (await served.graphs.UnpinGraph(UnpinGraphRequest(name=name))).graph
        assert not unpinned.HasField("pin")
        await served.graphs.UnpinGraph(UnpinGraphRequest(name=name))  # no error when there is none
        evicted = (await served.graphs.EvictGraph(EvictGraphRequest(name=name))).graph
        assert evicted.state == graph_pb2.GRAPH_STATE_EVICTED
        for call in (
            served.graphs.EvictGraph(EvictGraphRequest(name=name)),
            served.graphs.PinGraph(PinGraphRequest(name=name)),
        ):
            error = await refused(call)
            assert (error.code, error.reason) == (CODE.FAILED_PRECONDITION, "NOT_POSSIBLE")
        assert (await served.graphs.GetGraph(GetGraphRequest(name=name))).graph.state == evicted.state
        error = await refused(served.graphs.GetGraph(GetGraphRequest(name="graphs/t9-r9-greedy")))
        assert error.resource == ("hotgraph.v1.Graph", "graphs/t9-r9-greedy")


async def test_budget_can_be_read_and_changed_by_mask() -> None:
    """Only what the mask names changes; a smaller limit evicts down to it and tells what went."""
    engine = FakeEngine(rule=letters, backend=EagerBackend(size_bytes=lambda name: 100))
    async with serving(engine=engine) as served:
        await prewarmed(served, (1, 1), (2, 2), (4, 4))
        budget = (await served.graphs.GetBudget(GetBudgetRequest())).budget
        assert (budget.limit_bytes, budget.used_bytes, budget.num_graphs) == (1 << 30, 300, 3)
        response = await served.graphs.UpdateBudget(
            UpdateBudgetRequest(
                budget=graph_pb2.Budget(limit_bytes=100, stall_budget_per_second=Duration(seconds=1)),
                update_mask=FieldMask(paths=["limit_bytes"]),
            )
        )
        assert (response.budget.limit_bytes, response.budget.used_bytes) == (100, 100)
        assert response.budget.stall_budget_per_second == budget.stall_budget_per_second
        assert len(response.evicted_graphs) == 2
        assert all(name.startswith("graphs/t") for name in response.evicted_graphs)
        response = await served.graphs.UpdateBudget(
            UpdateBudgetRequest(
                budget=graph_pb2.Budget(stall_budget_per_second=Duration(nanos=250_000_000)),
                update_mask=FieldMask(paths=["stall_budget_per_second"]),
            )
        )
        assert response.budget.stall_budget_per_second.nanos == 250_000_000
        assert response.budget.limit_bytes == 100


async def test_profile_travels_to_another_daemon() -> None:
    """What one daemon learned makes the next one capture it; odd shapes and known graphs are skipped, other models refused."""
    async with serving() as served:
        await served.inference.Complete(CompleteRequest(text="x", max_tokens=20))
        profile = (await served.graphs.ExportProfile(ExportProfileRequest())).profile
        assert profile.model == "fake"
        assert len(profile.entries) >= 1
        one = (await served.graphs.ExportProfile(ExportProfileRequest(max_entries=1))).profile
        assert list(one.entries) == [profile.entries[0]]
        answer = await served.graphs.ImportProfile(ImportProfileRequest(profile=profile))
        assert answer.num_queued + answer.num_skipped == len(profile.entries)
    profile.entries.add(key=graph_pb2.GraphKey(tokens=1_000_001, rows=1, sampler=GREEDY), num_hits=5)
    async with serving() as served:
        answer = await served.graphs.ImportProfile(ImportProfileRequest(profile=profile))
        assert answer.num_queued == len(profile.entries) - 1
        assert answer.num_skipped == 1
        await eventually(lambda: served.engine.graphs.stats().num_ready == answer.num_queued)


async def next_event(call: Any) -> graph_pb2.GraphEvent:
    response = await asyncio.wait_for(call.read(), PATIENCE_SECONDS)
    event: graph_pb2.GraphEvent = response.event
    return event


async def test_watch_tells_what_happens_and_resumes() -> None:
    """From 0: everything kept, then what happens, without a gap; from a sequence number: what came after it."""
    async with serving() as served:
        await prewarmed(served, (1, 1))
        watch = served.graphs.WatchGraphs(WatchGraphsRequest(after_sequence=0))
        events = [await next_event(watch)]
        while events[-1].type != graph_pb2.GRAPH_EVENT_TYPE_PUBLISHED:
            events.append(await next_event(watch))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert events[0].type == graph_pb2.GRAPH_EVENT_TYPE_PLANNED
        assert events[-1].graph.name == "graphs/t1-r1-greedy"
        await prewarmed(served, (2, 2))
        while events[-1].type != graph_pb2.GRAPH_EVENT_TYPE_PUBLISHED or events[-1].graph.key.tokens != 2:
            events.append(await next_event(watch))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        watch.cancel()
        resumed = served.graphs.WatchGraphs(WatchGraphsRequest(after_sequence=events[1].sequence))
        assert await next_event(resumed) == events[2]
        resumed.cancel()


async def test_watch_from_now_on_skips_the_past() -> None:
    """Without a sequence number only new events come."""
    async with serving() as served:
        await prewarmed(served, (1, 1))
        watch = served.graphs.WatchGraphs(WatchGraphsRequest())
        first = asyncio.ensure_future(next_event(watch))

        async def is_heard() -> bool:  # the watch may begin after the first of these
            await served.graphs.EvictGraph(EvictGraphRequest(name="graphs/t1-r1-greedy"))
            await prewarmed(served, (1, 1))
            return first.done()

        await eventually(is_heard)
        assert (await first).sequence >= 4  # PLANNED, CAPTURED and PUBLISHED came before
        watch.cancel()


async def test_watcher_that_fell_behind_is_told_so() -> None:
    """Events that are no longer kept: OUT_OF_RANGE with what is kept, and nobody else is held up."""
    engine = FakeEngine(rule=letters, cache_settings=CacheSettings(max_events=8))
    async with serving(engine=engine) as served:
        await prewarmed(served, (1, 1), (2, 2), (4, 4), (8, 8))
        error = await stream_refused(served.graphs.WatchGraphs(WatchGraphsRequest(after_sequence=1)))
        assert (error.code, error.reason) == (CODE.OUT_OF_RANGE, "EVENTS_GONE")
        last = int(error.metadata["last_sequence"])
        assert int(error.metadata["oldest_sequence"]) == last - 7
        watch = served.graphs.WatchGraphs(WatchGraphsRequest(after_sequence=last - 1))
        assert (await next_event(watch)).sequence == last
        watch.cancel()
        await served.check_alive()


async def test_watchers_end_when_the_daemon_does() -> None:
    """A watch has no end of its own: a drain ends it with UNAVAILABLE, DRAINING."""
    async with serving() as served:
        watch = served.graphs.WatchGraphs(WatchGraphsRequest(after_sequence=0))
        await prewarmed(served, (1, 1))
        await next_event(watch)

        async def read_on() -> None:
            while await watch.read() is not grpc.aio.EOF:
                pass

        served.daemon.drain()
        error = await refused(read_on())
        assert (error.code, error.reason) == (CODE.UNAVAILABLE, "DRAINING")
