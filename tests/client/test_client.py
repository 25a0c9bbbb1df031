"""Every call but generations over the wire, for both clients: requests and answers, pages, watches, deadlines, health."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from hotgraph.v1 import (
    admin_service_pb2,
    generation_pb2,
    graph_pb2,
    graph_service_pb2,
    inference_service_pb2,
    model_pb2,
)
from hotgraph_client import (
    DeadlineError,
    EventsGoneError,
    GraphEventType,
    GraphKey,
    GraphProfile,
    Health,
    InvalidRequestError,
    NotFoundError,
    NotPossibleError,
    ProfileEntry,
    SamplerVariant,
    calls,
)
from tests.client.drivers import Driver
from tests.client.scripted_server import (
    ScriptedServer,
    abort,
    error_info,
    hang,
    serving,
    whole,
)

KEY = GraphKey(8, 4, SamplerVariant.GREEDY)
GRAPH = graph_pb2.Graph(name="graphs/a", num_hits=3)
SERVICES = [
    inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    graph_service_pb2.DESCRIPTOR.services_by_name["GraphService"],
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"],
]

# Method, its answer, the client's call with arguments, what the request must hold, what the answer must read as.
CASES: list[tuple[str, Any, str, tuple[Any, ...], dict[str, Any], dict[str, Any], Callable[[Any], Any], Any]] = [
    (
        "Tokenize",
        inference_service_pb2.TokenizeResponse(token_ids=[1, 2], pieces=[b"a", b"\xff"], context_length=9),
        "tokenize",
        ("ab",),
        {"add_special_tokens": False},
        {"text": "ab", "add_special_tokens": False},
        lambda tokenized: (tokenized.token_ids, tokenized.pieces, tokenized.context_length),
        ((1, 2), (b"a", b"\xff"), 9),
    ),
    (
        "Detokenize",
        inference_service_pb2.DetokenizeResponse(text="ab"),
        "detokenize",
        ([1, 2],),
        {"skip_special_tokens": False},
        {"token_ids": [1, 2], "skip_special_tokens": False},
        str,
        "ab",
    ),
    (
        "GetModel",
        inference_service_pb2.GetModelResponse(model=model_pb2.Model(id="m")),
        "get_model",
        ("m",),
        {},
        {"name": "m"},
        lambda model: model.id,
        "m",
    ),
    (
        "GetGraph",
        graph_service_pb2.GetGraphResponse(graph=GRAPH),
        "get_graph",
        ("graphs/a",),
        {},
        {"name": "graphs/a"},
        lambda graph: graph.num_hits,
        3,
    ),
    (
        "PrewarmGraphs",
        graph_service_pb2.PrewarmGraphsResponse(graphs=[GRAPH, GRAPH]),
        "prewarm_graphs",
        ([KEY],),
        {"wait_seconds": 2.0},
        {"keys": [graph_pb2.GraphKey(tokens=8, rows=4, sampler=graph_pb2.SAMPLER_VARIANT_GREEDY)]},
        len,
        2,
    ),
    (
        "PinGraph",
        graph_service_pb2.PinGraphResponse(graph=GRAPH),
        "pin_graph",
        ("graphs/a",),
        {"lease_seconds": 30},
        {"name": "graphs/a"},
        lambda graph: graph.name,
        "graphs/a",
    ),
    (
        "UnpinGraph",
        graph_service_pb2.UnpinGraphResponse(graph=GRAPH),
        "unpin_graph",
        ("graphs/a",),
        {},
        {"name": "graphs/a"},
        lambda graph: graph.name,
        "graphs/a",
    ),
    (
        "EvictGraph",
        graph_service_pb2.EvictGraphResponse(graph=GRAPH),
        "evict_graph",
        ("graphs/a",),
        {},
        {"name": "graphs/a"},
        lambda graph: graph.name,
        "graphs/a",
    ),
    (
        "GetBudget",
        graph_service_pb2.GetBudgetResponse(budget=graph_pb2.Budget(limit_bytes=7)),
        "get_budget",
        (),
        {},
        {},
        lambda budget: budget.limit_bytes,
        7,
    ),
    (
        "UpdateBudget",
        graph_service_pb2.UpdateBudgetResponse(budget=graph_pb2.Budget(limit_bytes=0), evicted_graphs=["graphs/a"]),
        "update_budget",
        (),
        {"limit_bytes": 0, "stall_budget_seconds": 0.25},
        {},
        lambda update: (update.budget.limit_bytes, update.evicted_graphs),
        (0, ("graphs/a",)),
    ),
    (
        "ExportProfile",
        graph_service_pb2.ExportProfileResponse(profile=graph_pb2.GraphProfile(model="m")),
        "export_profile",
        (5,),
        {},
        {"max_entries": 5},
        lambda profile: profile.model,
        "m",
    ),
    (
        "ImportProfile",
        graph_service_pb2.ImportProfileResponse(num_queued=1, num_skipped=2),
        "import_profile",
        (GraphProfile("m", None, (ProfileEntry(KEY, 1, 2, -0.5, 3),)),),
        {},
        {},
        lambda done: (done.num_queued, done.num_skipped),
        (1, 2),
    ),
    (
        "GetStatus",
        admin_service_pb2.GetStatusResponse(version="1.2"),
        "get_status",
        (),
        {},
        {},
        lambda status: status.version,
        "1.2",
    ),
    (
        "Drain",
        admin_service_pb2.DrainResponse(state=admin_service_pb2.DAEMON_STATE_DRAINING, num_requests=3),
        "drain",
        (),
        {"grace_seconds": 0},
        {},
        lambda drain: (drain.state.value, drain.num_requests),
        ("draining", 3),
    ),
]


@pytest.mark.parametrize(
    ("method", "answer", "name", "arguments", "options", "fields", "read", "expected"),
    CASES,
    ids=[case[0] for case in CASES],
)
async def test_unary_calls(
    server: ScriptedServer,
    driver: Driver,
    method: str,
    answer: Any,
    name: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    fields: dict[str, Any],
    read: Callable[[Any], Any],
    expected: Any,
) -> None:
    """Each call sends its arguments and reads its answer."""
    server.answers[method] = answer
    result = await driver.call(name, *arguments, **options)
    assert read(result) == expected
    ((called, request),) = server.unary_requests
    assert called == method
    for field, value in fields.items():
        got = getattr(request, field)
        assert (list(got) if isinstance(value, list) else got) == value


async def test_durations_and_masks(server: ScriptedServer, driver: Driver) -> None:
    """Seconds become durations, zero included, and an update names exactly what was given."""
    server.answers |= {
        "UpdateBudget": graph_service_pb2.UpdateBudgetResponse(),
        "Drain": admin_service_pb2.DrainResponse(),
        "ImportProfile": graph_service_pb2.ImportProfileResponse(),
    }
    await driver.call("update_budget", limit_bytes=0)
    await driver.call("update_budget", stall_budget_seconds=0.25)
    await driver.call("drain", grace_seconds=0)
    await driver.call("drain")
    await driver.call("import_profile", GraphProfile("m", None, (ProfileEntry(KEY, 1, 2, -0.5, 3),)))
    limit, stall, grace, no_grace, profile = (request for _, request in server.unary_requests)
    assert list(limit.update_mask.paths) == ["limit_bytes"]
    assert list(stall.update_mask.paths) == ["stall_budget_per_second"]
    assert stall.budget.stall_budget_per_second.ToMilliseconds() == 250
    assert grace.HasField("grace")
    assert not no_grace.HasField("grace")
    assert profile.profile.entries[0].saved_per_step.ToMilliseconds() == -500


def test_every_method_of_the_contract_has_a_call() -> None:
    """No method of the contract is without a call, and no path is misspelt."""
    source = Path(calls.__file__).read_text()
    for service in SERVICES:
        for method in service.methods:
            assert f'"/{service.full_name}/{method.name}"' in source
    known = {f"/{s.full_name}/{m.name}" for s in SERVICES for m in s.methods}
    assert {part for part in source.split('"') if part.startswith("/hotgraph.v1.")} == known


async def test_complete(server: ScriptedServer, driver: Driver) -> None:
    """complete() is one unary call; with resume=True it is a stream that goes on after a loss."""
    answer = inference_service_pb2.CompleteResponse(request_id="r", model="m", seed=5)
    answer.choices.add(text="ab", token_ids=[1, 2]).finish.reason = generation_pb2.FINISH_REASON_LENGTH
    server.answers["Complete"] = answer
    completion = await driver.call("complete", [("user", "hi")], max_tokens=2)
    assert (completion.text, completion.seed) == ("ab", 5)
    assert server.unary_requests[0][1].max_tokens == 2
    server.play(whole("abc"))
    assert (await driver.call("complete", "go on", resume=True)).text == "abc"
    assert len(server.requests) == 1


async def test_lists_walk_all_pages(server: ScriptedServer, driver: Driver) -> None:
    """A list is all of it, whatever the size of the server's pages."""

    async def models(request: Any, context: Any) -> Any:
        page = int(request.page_token or 0)
        return inference_service_pb2.ListModelsResponse(
            models=[model_pb2.Model(id=f"m{page}")], next_page_token=str(page + 1) if page < 2 else ""
        )

    async def graphs(request: Any, context: Any) -> Any:
        assert list(request.states) == [graph_pb2.GRAPH_STATE_READY]
        more = "" if request.page_token else "next"
        return graph_service_pb2.ListGraphsResponse(graphs=[GRAPH], next_page_token=more)

    server.answers |= {
        "ListModels": models,
        "ListGraphs": graphs,
        "ListClients": admin_service_pb2.ListClientsResponse(clients=[admin_service_pb2.Client(name="clients/1")]),
    }
    assert [model.id for model in await driver.call("list_models")] == ["m0", "m1", "m2"]
    assert len(await driver.call("list_graphs", ["ready"])) == 2
    assert [client.name for client in await driver.call("list_clients")] == ["clients/1"]


async def test_watch_graphs(server: ScriptedServer, driver: Driver) -> None:
    """A watch gives events as they come, and leaving it ends the call."""
    server.answers["WatchGraphs"] = [
        graph_service_pb2.WatchGraphsResponse(
            event=graph_pb2.GraphEvent(sequence=n, type=graph_pb2.GRAPH_EVENT_TYPE_PUBLISHED, graph=GRAPH)
        )
        for n in (1, 2, 3)
    ]
    events = await driver.first("watch_graphs", 2, 0)
    assert [(event.sequence, event.type) for event in events] == [
        (1, GraphEventType.PUBLISHED),
        (2, GraphEventType.PUBLISHED),
    ]
    assert server.unary_requests[0][1].HasField("after_sequence")
    await server.until(lambda: server.num_active == 0)


async def test_watch_fails_typed(server: ScriptedServer, driver: Driver) -> None:
    """A watch that the server ends raises the error of the status."""

    async def gone(request: Any, context: Any) -> Any:
        await abort(context, grpc.StatusCode.OUT_OF_RANGE, "gone", error_info("EVENTS_GONE"))

    server.answers["WatchGraphs"] = gone
    with pytest.raises(EventsGoneError):
        await driver.first("watch_graphs", 1, 1)


async def test_errors_of_unary_calls(server: ScriptedServer, driver: Driver) -> None:
    """A unary call raises the error of its status, and what no message can hold is refused before it is sent."""

    async def pinned(request: Any, context: Any) -> Any:
        await abort(context, grpc.StatusCode.FAILED_PRECONDITION, "pinned", error_info("NOT_POSSIBLE"))

    server.answers["EvictGraph"] = pinned
    with pytest.raises(NotPossibleError, match="pinned"):
        await driver.call("evict_graph", "graphs/a")
    with pytest.raises(InvalidRequestError):
        await driver.call("detokenize", [-1])
    with pytest.raises(TypeError):
        await driver.call("tokenize", [1, 2])


async def test_deadline_of_unary_calls(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    """The client's timeout is the default of each call, and a call's own comes first."""
    driver = await connect(timeout=30.0)
    left = []

    async def note(request: Any, context: Any) -> Any:
        left.append(context.time_remaining())
        return graph_service_pb2.GetBudgetResponse()

    server.answers |= {"GetBudget": note, "GetStatus": hang}
    await driver.call("get_budget")
    await driver.call("get_budget", timeout=5)
    assert 25 < left[0] <= 30.5
    assert left[1] <= 5.5
    with pytest.raises(DeadlineError):
        await driver.call("get_status", timeout=0.1)


async def test_a_closed_client(server: ScriptedServer, driver: Driver) -> None:
    """A closed client makes no calls."""
    closing = driver.client.close()
    if closing is not None:
        await closing
    with pytest.raises(RuntimeError, match="closed"):
        await driver.call("get_status")
    with pytest.raises(RuntimeError, match="closed"):
        driver.client.generate("x")


async def test_health(connect: Callable[..., Any], socket_path: Path) -> None:
    """check_health and watch_health speak grpc.health.v1 without its package."""
    health = HealthServicer()

    def add(aio_server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(health, aio_server)

    async with serving(ScriptedServer(), f"unix:{socket_path}", extra=add):
        driver = await connect()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        await health.set("hotgraph.warm", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert await driver.call("check_health") is Health.SERVING
        assert await driver.call("check_health", "hotgraph.warm") is Health.NOT_SERVING
        with pytest.raises(NotFoundError):
            await driver.call("check_health", "other")
        assert await driver.first("watch_health", 1, "other") == [Health.SERVICE_UNKNOWN]
