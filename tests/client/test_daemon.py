"""Both clients against the real daemon with the fake engine: what is promised on both sides meets here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from hotgraph.v1.generation_pb2 import Started
from hotgraph.v1.generation_pb2 import Tokens as TokensMessage
from hotgraph.v1.inference_service_pb2 import GenerateResponse
from hotgraph_client import (
    ContextLengthError,
    DeadlineError,
    DrainingError,
    DuplicateRequestError,
    Event,
    FinishReason,
    GraphEventType,
    GraphKey,
    GraphMode,
    GraphNotFoundError,
    GraphNotReadyError,
    GraphState,
    Health,
    InvalidRequestError,
    ModelNotFoundError,
    ResumePolicy,
    SamplerVariant,
    Tokens,
)
from hotgraph_client.requests import generation_spec
from hotgraph_client.resume import GenerationProgress
from hotgraph_server.engine import hash_rule
from hotgraph_server.engine.token_rules import script_rule
from tests.client.drivers import Driver
from tests.client.scripted_server import Relay
from tests.integration.harness import Serving, eventually, serving

# Half characters, whole ones and pieces of the stop string, in an order that depends on seed and all ids so far.
TORN = hash_rule(tuple("é€😀".encode()) + tuple(b"abSTOP"))
SECOND = ResumePolicy(first_backoff_seconds=0.01, max_backoff_seconds=0.05, max_losses=50)


@pytest.fixture
async def daemon() -> AsyncIterator[Serving]:
    async with serving() as served:
        yield served


@pytest.fixture
async def client(daemon: Serving, connect: Callable[..., Any]) -> Driver:
    # Without gRPC's retries, so that each refusal is seen at once.
    driver: Driver = await connect(daemon.daemon.addresses[0], max_attempts=1)
    return driver


async def test_generate_and_complete_agree(client: Driver) -> None:
    """Stream and unary twin give the same ids, text, ends and usage for the same seed."""
    options: dict[str, Any] = {"seed": 5, "max_tokens": 20, "num_choices": 2, "logprobs": 2, "stop": ["fgh"]}
    streamed = await client.result([("user", "hi")], **options)
    unary = await client.call("complete", [("user", "hi")], **options)
    assert streamed.choices == unary.choices
    assert streamed.usage.completion_tokens == unary.usage.completion_tokens
    assert streamed.choices[0].text == "abcde"
    assert streamed.finish_reason is FinishReason.STOP
    assert streamed.choices[0].finish is not None
    assert streamed.choices[0].finish.stop_string == "fgh"
    assert len(streamed.choices[0].logprobs) == len(streamed.token_ids)
    assert streamed.receipt.num_steps > 0
    assert streamed.timings.total_seconds > 0


async def test_typed_errors(client: Driver) -> None:
    """The daemon's refusals arrive as errors of the same names with their details."""
    with pytest.raises(InvalidRequestError) as invalid:
        await client.call("complete", "", top_p=float("nan"), max_tokens=0)
    assert {violation.field for violation in invalid.value.violations} >= {"sampling.top_p", "max_tokens", "text"}
    with pytest.raises(ContextLengthError) as too_long:
        await client.call("complete", "hello", max_tokens=5000)
    assert too_long.value.metadata["limit"] == "1024"
    with pytest.raises(ModelNotFoundError) as no_model:
        await client.result("hello", model="other")
    assert no_model.value.resource is not None
    with pytest.raises(GraphNotFoundError):
        await client.call("get_graph", "graphs/none")
    with pytest.raises(GraphNotReadyError) as not_ready:
        await client.result("hello", graph_policy=GraphMode.REQUIRE, top_k=7, num_choices=7)
    assert not_ready.value.retry_after_seconds is not None


async def test_a_request_id_in_flight(daemon: Serving, client: Driver) -> None:
    """An id may be in flight once."""
    daemon.engine.hold_step(0)
    first = asyncio.ensure_future(client.result("hello", request_id="mine", max_tokens=3))
    await daemon.engine.wait_held()
    with pytest.raises(DuplicateRequestError):
        await client.result("hello", request_id="mine", max_tokens=3)
    daemon.engine.release()
    assert (await first).request_id == "mine"


async def test_deadline_frees_the_slot(daemon: Serving, client: Driver) -> None:
    """A timeout ends the request on both sides."""
    daemon.engine.hold_step(3)
    with pytest.raises(DeadlineError):
        await client.result("hello", max_tokens=100, timeout=0.3)
    daemon.engine.release()
    await eventually(daemon.is_all_free)


async def test_leaving_frees_the_slot(daemon: Serving, client: Driver) -> None:
    """A stream that is dropped in the middle frees slot and blocks."""
    daemon.engine.hold_step(5)
    generation = client.client.generate("hello", max_tokens=100)
    await daemon.engine.wait_held()
    generation.cancel()
    daemon.engine.release()
    await eventually(daemon.is_all_free)
    status = await client.call("get_status")
    assert status.scheduler.num_cancelled == 1


async def test_graphs_and_admin(daemon: Serving, client: Driver) -> None:
    """The calls around generation read what the daemon really holds."""
    await client.result("hello", max_tokens=8)
    ready = await client.call("prewarm_graphs", [GraphKey(4, 4, SamplerVariant.GREEDY)], wait_seconds=20)
    assert ready[0].state is GraphState.READY
    graph = await client.call("get_graph", ready[0].name)
    assert graph.key == GraphKey(4, 4, SamplerVariant.GREEDY)
    assert (await client.call("pin_graph", graph.name, lease_seconds=60)).pin_expire_time is not None
    assert (await client.call("unpin_graph", graph.name)).pin_expire_time is None
    assert (await client.call("evict_graph", graph.name)).state is GraphState.EVICTED
    update = await client.call("update_budget", limit_bytes=1 << 20, stall_budget_seconds=0.5)
    assert (update.budget.limit_bytes, update.budget.stall_budget_seconds) == (1 << 20, 0.5)
    assert await client.call("get_budget") == update.budget
    profile = await client.call("export_profile")
    assert profile.model == "fake"
    done = await client.call("import_profile", profile)
    assert done.num_queued + done.num_skipped == len(profile.entries)
    (event,) = await client.first("watch_graphs", 1, 0)
    assert event.type is GraphEventType.PLANNED
    assert await client.call("list_graphs", [GraphState.READY])
    assert [model.id for model in await client.call("list_models")] == ["fake"]
    assert (await client.call("get_model")).context_length == 1024
    tokens = await client.call("tokenize", "naïve 😀")
    assert await client.call("detokenize", tokens.token_ids) == "naïve 😀"
    assert (await client.call("get_status")).model == "fake"
    assert any(one.user_agent.startswith("hotgraph-python") for one in await client.call("list_clients"))
    assert await client.call("check_health") is Health.SERVING
    assert await client.first("watch_health", 1) == [Health.SERVING]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 12},
        {"seed": 12, "stop": ["STOP", "O€"], "num_choices": 3},
        {"resume": True, "num_choices": 2, "logprobs": 1, "stop": ["aa"]},
        {"seed": 3, "repetition_penalty": 1.2, "num_choices": 2},
    ],
    ids=["greedy", "seeded", "stops", "unseeded", "penalties"],
)
async def test_going_on_at_another_daemon(connect: Callable[..., Any], tmp_path: Path, options: dict[str, Any]) -> None:
    """A generation whose connection is cut again and again, each time to another daemon, is that of an unbroken one."""
    async with serving(rule=TORN) as one, serving(rule=TORN) as two:
        paths = [Path(served.daemon.addresses[0].removeprefix("unix:")) for served in (one, two)]
        async with Relay(tmp_path / "r.sock", paths[0]).running() as relay:
            torn = await connect(relay.target, resume_policy=SECOND)
            whole = await connect(one.daemon.addresses[0])
            cuts = {3, 4, 9, 17, 30, 31, 45}
            num_events = 0
            loop = asyncio.get_running_loop()

            def cut() -> None:
                paths.reverse()
                relay.upstream = paths[0]
                relay.cut()

            def on_event(event: Event) -> None:
                nonlocal num_events
                num_events += isinstance(event, Tokens)
                if num_events in cuts:
                    cuts.discard(num_events)
                    loop.call_soon_threadsafe(cut)

            for served in (one, two):
                served.engine.step_seconds = 0.002
            result = await torn.result("go on", max_tokens=64, on_event=on_event, **options)
            options = {**options, "seed": result.seed} if "temperature" not in options else options
            expected = await whole.result("go on", max_tokens=64, **options)
            assert result.choices == expected.choices
            assert result.usage.completion_tokens == expected.usage.completion_tokens
            assert result.num_resumes >= 1
            for served in (one, two):
                await eventually(served.is_all_free)


async def test_engine_failure_goes_on_elsewhere(connect: Callable[..., Any], tmp_path: Path) -> None:
    """When the engine fails in the middle the daemon says so, and the client goes on at the next one."""
    async with serving(rule=TORN) as two:
        async with serving(rule=TORN) as one:
            one.engine.fail_step(10)
            path = Path(one.daemon.addresses[0].removeprefix("unix:"))
            async with Relay(tmp_path / "r.sock", path).running() as relay:
                driver = await connect(relay.target, resume_policy=SECOND, max_attempts=1)

                def switch(event: Event) -> None:
                    relay.upstream = Path(two.daemon.addresses[0].removeprefix("unix:"))

                result = await driver.result("go on", max_tokens=40, temperature=0, on_event=switch)
        whole = await connect(two.daemon.addresses[0])
        expected = await whole.result("go on", max_tokens=40, temperature=0)
        assert result.choices == expected.choices
        assert result.num_resumes == 1


@pytest.mark.parametrize(
    "options", [{"max_tokens": 4}, {}, {"stop": ["na\u00ef"]}], ids=["length", "end of text", "stop"]
)
async def test_lost_right_before_the_end(options: dict[str, Any]) -> None:
    """A choice that had its last token but not yet its end is ended by the next daemon, with the text held back until then."""
    async with serving(rule=script_rule(list("naïve".encode()))) as served:
        spec = generation_spec("go on", temperature=0.0, **options)
        whole, torn = GenerationProgress(spec), GenerationProgress(spec)
        async for message in served.inference.Generate(whole.open().request):
            whole.receive(message)
            if message.WhichOneof("event") == "tokens" and message.tokens.HasField("finish"):
                break
        ids = whole.choices[0].token_ids
        torn.open()
        torn.receive(GenerateResponse(started=Started(model="fake", prompt_tokens=6)))
        torn.receive(GenerateResponse(tokens=TokensMessage(token_ids=ids)))
        torn.lose(None)
        events = [torn.receive(m) async for m in served.inference.Generate(torn.open().request) if not torn.is_ended]
        (ended,) = (event for event in events if isinstance(event, Tokens))
        assert ended.token_ids == ()
        assert torn.choices[0].finish == whole.choices[0].finish
        assert torn.completion().usage.completion_tokens == len(ids)


async def test_draining(daemon: Serving, client: Driver) -> None:
    """A draining daemon finishes what runs, refuses what is new, and health says so."""
    daemon.engine.hold_step(3)
    running = asyncio.ensure_future(client.result("hello", max_tokens=10))
    await daemon.engine.wait_held()
    status = await client.call("drain", grace_seconds=20)
    assert status.num_requests == 1
    with pytest.raises(DrainingError):
        await client.call("complete", "hello", timeout=20)
    assert await client.call("check_health") is Health.NOT_SERVING
    daemon.engine.release()
    assert (await running).usage.completion_tokens == 10
