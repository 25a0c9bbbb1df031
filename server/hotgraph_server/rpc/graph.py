"""GraphService: the cache of the served model over gRPC. What the cache refuses becomes an error of ours here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc.aio

import graphcache
from graphcache import Clock, GraphCache, GraphInfo, GraphState, Priority
from hotgraph.v1 import graph_service_pb2, graph_service_pb2_grpc
from hotgraph_server.batch import StepKey
from hotgraph_server.engine.failure import engine_failed
from hotgraph_server.errors import GraphNotFoundError, NotPossibleError
from hotgraph_server.rpc import validate
from hotgraph_server.rpc.lifecycle import Lifecycle, ServedModel
from hotgraph_server.rpc.paging import decode_page_token, encode_page_token
from hotgraph_server.rpc.watch import EventHub
from hotgraph_server.rpc.wire import graphs
from hotgraph_server.rpc.wire.common import from_duration

Context = grpc.aio.ServicerContext[Any, Any]

PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000
UNFINISHED: Final = frozenset({GraphState.QUEUED, GraphState.CAPTURING})


class GraphServicer(graph_service_pb2_grpc.GraphServiceServicer):
    """Shows and steers the graph cache."""

    def __init__(self, lifecycle: Lifecycle, clock: Clock) -> None:
        self._lifecycle = lifecycle
        self._clock = clock
        self._hub: EventHub | None = None

    def open(self, served: ServedModel) -> EventHub:
        """Starts listening to the model's cache. Called once, when it is loaded."""
        self._hub = EventHub(served.engine.graphs)
        return self._hub

    def close(self) -> None:
        """Ends every watcher and every wait."""
        if self._hub is not None:
            self._hub.close()

    async def ListGraphs(  # noqa: N802  (the contract's name, as all below)
        self, request: graph_service_pb2.ListGraphsRequest, context: Context
    ) -> graph_service_pb2.ListGraphsResponse:
        cache = self._cache()
        page_size = validate.check_page_size(request.page_size, default=PAGE_SIZE, maximum=MAX_PAGE_SIZE)
        validate.check_graph_states(request.states)
        after = decode_page_token(request.page_token, (int, str))
        # Most hits first, then by name. Counts change between pages, so a token is a place in the order, not an index: an
        # entry may be missed or shown twice only if its own count moved across that place.
        infos = sorted(cache.list(graphs.graph_states(request.states)), key=_place)
        rest = infos if after is None else [info for info in infos if _place(info) > after]
        page = rest[:page_size]
        return graph_service_pb2.ListGraphsResponse(
            graphs=[graphs.graph_message(info) for info in page],
            next_page_token=encode_page_token(_place(page[-1])) if len(rest) > len(page) else "",
            total_size=len(infos),
        )

    async def GetGraph(  # noqa: N802
        self, request: graph_service_pb2.GetGraphRequest, context: Context
    ) -> graph_service_pb2.GetGraphResponse:
        cache = self._cache()
        with _graph_errors(request.name):
            info = cache.get(validate.check_graph_name(request.name))
        return graph_service_pb2.GetGraphResponse(graph=graphs.graph_message(info))

    async def PrewarmGraphs(  # noqa: N802
        self, request: graph_service_pb2.PrewarmGraphsRequest, context: Context
    ) -> graph_service_pb2.PrewarmGraphsResponse:
        served = self._lifecycle.require()
        validate.check_prewarm(request)
        keys = _buckets(served, [graphs.step_key(key) for key in request.keys])
        cache = served.engine.graphs
        with _graph_errors(""):
            for key in keys:
                cache.request(key, Priority.OPERATOR)
        if request.HasField("wait"):
            await self._wait(cache, keys, from_duration(request.wait))
        with _graph_errors(""):
            infos = [cache.get(str(key)) for key in keys]
        return graph_service_pb2.PrewarmGraphsResponse(graphs=[graphs.graph_message(info) for info in infos])

    async def PinGraph(  # noqa: N802
        self, request: graph_service_pb2.PinGraphRequest, context: Context
    ) -> graph_service_pb2.PinGraphResponse:
        cache = self._cache()
        lease_seconds = validate.check_pin(request)
        with _graph_errors(request.name):
            info = cache.pin(validate.check_graph_name(request.name), lease_seconds)
        return graph_service_pb2.PinGraphResponse(graph=graphs.graph_message(info))

    async def UnpinGraph(  # noqa: N802
        self, request: graph_service_pb2.UnpinGraphRequest, context: Context
    ) -> graph_service_pb2.UnpinGraphResponse:
        cache = self._cache()
        with _graph_errors(request.name):
            info = cache.unpin(validate.check_graph_name(request.name))
        return graph_service_pb2.UnpinGraphResponse(graph=graphs.graph_message(info))

    async def EvictGraph(  # noqa: N802
        self, request: graph_service_pb2.EvictGraphRequest, context: Context
    ) -> graph_service_pb2.EvictGraphResponse:
        cache = self._cache()
        with _graph_errors(request.name):
            info = cache.evict(validate.check_graph_name(request.name))
        return graph_service_pb2.EvictGraphResponse(graph=graphs.graph_message(info))

    async def GetBudget(  # noqa: N802
        self, request: graph_service_pb2.GetBudgetRequest, context: Context
    ) -> graph_service_pb2.GetBudgetResponse:
        return graph_service_pb2.GetBudgetResponse(budget=graphs.budget_message(self._cache().budget()))

    async def UpdateBudget(  # noqa: N802
        self, request: graph_service_pb2.UpdateBudgetRequest, context: Context
    ) -> graph_service_pb2.UpdateBudgetResponse:
        cache = self._cache()
        paths, budget = request.update_mask.paths, request.budget
        validate.check_budget(budget, paths)
        with _graph_errors(""):
            evicted = cache.update_budget(
                limit_bytes=budget.limit_bytes if "limit_bytes" in paths else None,
                stall_budget_seconds=(
                    from_duration(budget.stall_budget_per_second) if "stall_budget_per_second" in paths else None
                ),
            )
        return graph_service_pb2.UpdateBudgetResponse(
            budget=graphs.budget_message(cache.budget()), evicted_graphs=[graphs.graph_name(name) for name in evicted]
        )

    async def WatchGraphs(  # type: ignore[override]  # noqa: N802  (the stubs know generators only)
        self, request: graph_service_pb2.WatchGraphsRequest, context: Context
    ) -> None:
        self._lifecycle.require()
        after = request.after_sequence if request.HasField("after_sequence") else None
        async for event in self._open_hub().follow(after):
            await context.write(graph_service_pb2.WatchGraphsResponse(event=graphs.event_message(event)))

    async def ExportProfile(  # noqa: N802
        self, request: graph_service_pb2.ExportProfileRequest, context: Context
    ) -> graph_service_pb2.ExportProfileResponse:
        served = self._lifecycle.require()
        max_entries = validate.check_export(request.max_entries)
        profile = graphs.profile_message(
            served.engine.graphs.export_profile(max_entries),
            model_id=served.model_id,
            create_time=self._clock.time(),
        )
        return graph_service_pb2.ExportProfileResponse(profile=profile)

    async def ImportProfile(  # noqa: N802
        self, request: graph_service_pb2.ImportProfileRequest, context: Context
    ) -> graph_service_pb2.ImportProfileResponse:
        served = self._lifecycle.require()
        validate.check_profile(request.profile)
        if request.profile.model != served.model_id:
            raise NotPossibleError("the profile was learned with another model")
        profile = graphs.profile_from(request.profile)
        known, num_unknown = fitting_profile(served, profile)
        with _graph_errors(""):
            num_queued, num_skipped = served.engine.graphs.import_profile(known)
        return graph_service_pb2.ImportProfileResponse(num_queued=num_queued, num_skipped=num_skipped + num_unknown)

    # What the calls share.

    def _cache(self) -> GraphCache[StepKey]:
        return self._lifecycle.require().engine.graphs

    def _open_hub(self) -> EventHub:
        if self._hub is None:
            raise RuntimeError("the daemon serves and nobody opened the graph service")
        return self._hub

    async def _wait(self, cache: GraphCache[StepKey], keys: list[StepKey], seconds: float) -> None:
        """Until no capture of these is under way, or the time is over."""
        hub = self._open_hub()
        try:
            async with asyncio.timeout(seconds):
                while any(cache.get(str(key)).state in UNFINISHED for key in keys):
                    await hub.news()
        except TimeoutError:
            return  # the caller asked for an answer by then, whatever stands


def fitting_profile(
    served: ServedModel, profile: graphcache.Profile[StepKey]
) -> tuple[graphcache.Profile[StepKey], int]:
    """The entries that are buckets of this daemon, and the number of those that are not."""
    entries = tuple(entry for entry in profile.entries if _is_bucket(served, entry.key))
    return graphcache.Profile(entries=entries), len(profile.entries) - len(entries)


def _is_bucket(served: ServedModel, key: StepKey) -> bool:
    return served.engine.bucket(key.tokens, key.rows, key.sampler) == key


def _buckets(served: ServedModel, keys: list[StepKey]) -> list[StepKey]:
    """The bucket of each key, none twice. Raises InvalidRequestError for keys larger than every bucket."""
    found = validate.Violations()
    buckets: dict[StepKey, None] = {}
    for index, key in enumerate(keys):
        bucket = served.engine.bucket(key.tokens, key.rows, key.sampler)
        if bucket is None:
            found.add(f"keys[{index}]", "is larger than the largest bucket")
        else:
            buckets[bucket] = None
    found.raise_any()
    return list(buckets)


def _place(info: GraphInfo[StepKey]) -> tuple[int, str]:
    return -info.num_hits, info.name


@contextmanager
def _graph_errors(name: str) -> Iterator[None]:
    """The cache's errors as ours."""
    try:
        yield
    except graphcache.UnknownGraphError as error:
        raise GraphNotFoundError(name or graphs.graph_name(error.name)) from None
    except graphcache.GraphStateError as error:
        raise NotPossibleError(str(error)) from None
    except (graphcache.DeviceLostError, graphcache.CacheClosedError):
        raise engine_failed() from None
