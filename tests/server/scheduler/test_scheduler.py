"""Tests of scheduler/scheduler.py, on a fake engine that checks every batch."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from unittest import mock

import pytest

from graphcache import DeviceLostError, FakeBackend
from graphcache.backends.fake import FakeCaptured
from hotgraph_server.engine.token_rules import History, echo_rule, hash_rule
from hotgraph_server.errors import (
    CancelledRequestError,
    ContextLengthError,
    DeadlineError,
    DrainingError,
    DuplicateRequestError,
    EngineFailedError,
    GraphNotReadyError,
    HotgraphError,
    InternalError,
    InvalidRequestError,
    QueueFullError,
    ServerTimeLimitError,
)
from hotgraph_server.request import (
    FinishReason,
    GraphMode,
    GraphPolicy,
    Request,
    SamplingParams,
    StopParams,
    TokensEvent,
    choice_seed,
)
from hotgraph_server.scheduler import RequestStream

from .conftest import House, read, request

Make = Callable[..., Awaitable[House]]

GREEDY = SamplingParams(temperature=0.0)


def expected(wanted: Request, choice_index: int = 0) -> list[int]:
    """The completion that the engine's rule gives a request that nothing stops early."""
    rule = hash_rule()
    seed = choice_seed(wanted.sampling.seed, choice_index)
    completion: list[int] = []
    while len(completion) < wanted.max_tokens:
        completion.append(rule(History(wanted.prompt_token_ids, tuple(completion), wanted.sampling, seed)))
    return completion


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition that other tasks bring about; the test's own timeout bounds it."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.001)


def assert_all_free(house: House) -> None:
    """No slot and no block is held."""
    status = house.scheduler.status()
    assert (status.num_running, status.num_waiting, status.kv_cache.num_used_blocks) == (0, 0, 0)


async def test_a_request_starts_at_once_when_asked_to(house: Make) -> None:
    """`advance` gives the engine a submitted request's first step before it returns, and no step twice."""
    here = await house()
    wanted = request(max_tokens=3)
    stream = here.scheduler.submit(wanted)
    assert not here.engine.batches
    here.scheduler.advance()
    here.scheduler.advance()
    assert len(here.engine.batches) == 1
    assert (await read(stream)).token_ids == {0: expected(wanted)}
    assert len(here.engine.batches) == 3


@pytest.mark.parametrize("num_requests", [1, 2])
async def test_a_lone_reader_comes_before_the_next_plan(house: Make, num_requests: int) -> None:
    """While a step runs ahead, a lone request's token is read before another step is planned; beside others, after."""
    here = await house(run_ahead=1, step_seconds=0.02)
    wanted = [request(f"r{index}", max_tokens=6) for index in range(num_requests)]
    streams = [here.scheduler.submit(one) for one in wanted]
    await anext(streams[0])
    assert len(here.engine.batches) == (2 if num_requests == 1 else 3)
    for stream, one in zip(streams, wanted, strict=True):
        first = [] if stream is not streams[0] else expected(one)[:1]
        assert first + (await read(stream)).token_ids[0] == expected(one)


async def test_prompts_are_hashed_while_their_step_runs(house: Make) -> None:
    """When a step's tokens are there, the hashes of its prompt's blocks are too: nothing of them holds up the tokens."""
    here = await house(step_seconds=0.5)
    wanted = request(prompt=bytes(range(48)), max_tokens=1)
    stream = here.scheduler.submit(wanted)
    here.scheduler.advance()
    (step,) = here.scheduler._in_flight
    (sequence,) = step.plan.sequences
    table = sequence.table
    assert table is not None
    await until(lambda: bool(table.hashes))
    assert not step.result.done()
    assert len(table.hashes) == 48 // here.engine.info.block_size > 0
    with mock.patch("hotgraph_server.scheduler.blocks.block_hash", side_effect=AssertionError):
        assert (await read(stream)).token_ids == {0: expected(wanted)}
    assert here.scheduler.status().kv_cache.num_cached_blocks == 48 // here.engine.info.block_size


async def test_a_request_runs_from_submit_to_finished(house: Make) -> None:
    """Tokens, text, usage, timings and receipt of one request are what happened."""
    made = await house()
    wanted = request(max_tokens=8)
    answer = await read(made.scheduler.submit(wanted))
    assert answer.token_ids == {0: expected(wanted)}
    assert answer.text == {0: bytes(expected(wanted)).decode()}
    finished = answer.finished
    assert [finish.reason for finish in finished.choices] == [FinishReason.LENGTH]
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 8)
    assert finished.receipt.num_steps == 8 == len(made.engine.batches)
    assert {group.phase for group in finished.receipt.step_groups} == {"prefill", "decode"}
    timings = finished.timings
    assert timings.time_to_first_token == pytest.approx(timings.queue + timings.prefill)
    assert timings.total >= timings.time_to_first_token + timings.decode
    assert timings.time_per_output_token == pytest.approx(timings.decode / 7)
    assert_all_free(made)


@pytest.mark.parametrize("run_ahead", [0, 1])
async def test_many_requests_of_all_kinds_get_their_own_tokens(house: Make, run_ahead: int) -> None:
    """Whatever runs beside it, pre-empted, chunked or sharing prefixes, every request gets the tokens it would get alone."""
    chance = random.Random(run_ahead)
    made = await house(
        run_ahead=run_ahead, num_slots=6, num_blocks=24, block_size=4, context_length=80, max_step_tokens=16
    )
    shared = bytes(chance.choices(b"abc", k=20))
    requests = [
        request(
            f"r{index}",
            shared[: chance.randrange(21)] + bytes(chance.choices(b"xyz", k=chance.randrange(1, 20))),
            max_tokens=chance.randrange(1, 40),
            num_choices=chance.choice([1, 1, 1, 2]),
            sampling=SamplingParams(temperature=chance.choice([0.0, 0.8]), seed=index),
        )
        for index in range(60)
    ]
    answers = await asyncio.gather(*(read(made.scheduler.submit(wanted)) for wanted in requests))
    for wanted, answer in zip(requests, answers, strict=True):
        assert answer.token_ids == {i: expected(wanted, i) for i in wanted.choice_indices}
        assert answer.finished.usage.completion_tokens == wanted.max_tokens * wanted.num_choices
    status = made.scheduler.status()
    assert status.num_preemptions > 0
    assert status.kv_cache.num_cached_tokens > 0
    assert status.num_finished == 60
    assert_all_free(made)


async def test_tokens_after_a_late_stop_are_never_sent(house: Make) -> None:
    """With a step in flight when the stop is seen, its token is thrown away and its place given back."""
    made = await house(run_ahead=1, rule=echo_rule(), step_seconds=0.002)
    answer = await read(made.scheduler.submit(request(prompt=b"abc", max_tokens=50)))
    assert answer.token_ids == {0: [*b"abc", 256]}
    assert answer.text == {0: "abc"}
    await made.scheduler.wait_idle()
    assert len(made.engine.batches) == 5  # one step ran for nothing
    assert_all_free(made)


@pytest.mark.parametrize("run_ahead", [0, 1])
async def test_leaving_a_stream_frees_slot_and_blocks_at_the_next_step(house: Make, run_ahead: int) -> None:
    """A cancelled request takes part in no step planned after its end, and others go on."""
    made = await house(run_ahead=run_ahead, step_seconds=0.002)
    stream = made.scheduler.submit(request("gone", max_tokens=500))
    other = asyncio.create_task(read(made.scheduler.submit(request("stays", b"other", max_tokens=40))))
    await anext(stream)
    num_batches = len(made.engine.batches)
    stream.close()
    await until(lambda: made.scheduler.status().num_running == 1)
    assert len(made.engine.batches) <= num_batches + 1 + run_ahead
    assert (await other).token_ids == {0: expected(request("stays", b"other", max_tokens=40))}
    assert made.scheduler.status().num_cancelled == 1
    assert_all_free(made)


async def test_a_waiting_request_can_be_cancelled(house: Make) -> None:
    """A request that leaves the queue never runs."""
    made = await house(num_slots=1, step_seconds=0.001)
    running = made.scheduler.submit(request("a", max_tokens=20))
    made.scheduler.submit(request("b", b"never")).close()
    await read(running)
    assert all(row.slot == 0 for batch in made.engine.batches for row in batch.rows)
    assert sum(len(batch.assignments) for batch in made.engine.batches) == 1


async def test_a_deadline_ends_running_and_waiting_requests(house: Make) -> None:
    """Past its deadline a request ends with its error, running or not, also while a step hangs; the slot comes back."""
    made = await house(num_slots=1)
    made.engine.hold_step(3)
    loop_time = asyncio.get_running_loop().time()
    running = made.scheduler.submit(request("a", max_tokens=20, deadline=loop_time + 0.05))
    waiting = made.scheduler.submit(request("b", max_tokens=20, deadline=loop_time + 0.05, is_server_deadline=True))
    with pytest.raises(DeadlineError) as caught:
        await read(running)
    assert type(caught.value) is DeadlineError
    with pytest.raises(ServerTimeLimitError):
        await read(waiting)
    assert made.scheduler.status().num_running == 1  # the step that hangs may still write to its blocks
    made.engine.release()
    await made.scheduler.wait_idle()
    assert made.scheduler.status().num_expired == 2
    assert_all_free(made)


async def test_a_loop_that_was_held_up_starts_nothing_late(house: Make) -> None:
    """When the loop comes round to the next step before the timer of a deadline that has passed, who waited is not started."""
    made = await house(num_slots=1)
    stream = made.scheduler.submit(request(deadline=asyncio.get_running_loop().time() + 0.01))
    time.sleep(0.03)  # noqa: ASYNC251  (the loop is held up)
    made.scheduler.advance()
    with pytest.raises(DeadlineError):
        await read(stream)
    assert made.engine.batches == []
    assert made.scheduler.status().num_running == 0


async def test_a_deadline_that_has_passed_is_refused_at_once(house: Make) -> None:
    """Work that cannot be in time is not begun."""
    made = await house()
    with pytest.raises(DeadlineError):
        made.scheduler.submit(request(deadline=asyncio.get_running_loop().time() - 1))
    assert made.scheduler.status().num_requests == 0


async def test_a_full_queue_refuses_and_says_when_to_come_back(house: Make) -> None:
    """Slots and queue bound what is accepted; who is refused costs nobody else anything."""
    made = await house(num_slots=1, settings={"max_waiting": 2}, step_seconds=0.001)
    streams = [made.scheduler.submit(request(f"r{index}", max_tokens=4)) for index in range(3)]
    with pytest.raises(QueueFullError) as caught:
        made.scheduler.submit(request("r3"))
    assert caught.value.retry_after_seconds > 0
    for stream in streams:
        await read(stream)
    await read(made.scheduler.submit(request("r3")))
    assert made.scheduler.status().num_rejected == 1


async def test_in_a_full_queue_the_greediest_gives_way(house: Make) -> None:
    """Of a full queue everybody may have as much as others: the last that came of whom most wait is told to come back."""
    made = await house(num_slots=1, settings={"max_waiting": 5}, step_seconds=0.001)
    greedy = [made.scheduler.submit(request(f"g{index}", max_tokens=4, client="greedy")) for index in range(6)]
    made.scheduler.advance()  # the first has the slot
    modest = [made.scheduler.submit(request("m0", max_tokens=4, client="modest"))]
    modest.append(made.scheduler.submit(request("m1", max_tokens=4, client="modest")))
    for wanted in (request("m2", client="modest"), request("g6", client="greedy"), request("two", num_choices=3)):
        with pytest.raises(QueueFullError, match="wait already"):
            made.scheduler.submit(wanted)
    for stream in greedy[4:]:
        with pytest.raises(QueueFullError, match="this caller's") as caught:
            await read(stream)
        assert caught.value.retry_after_seconds > 0
    for stream in [*greedy[:4], *modest]:
        await read(stream)
    status = made.scheduler.status()
    assert (status.num_rejected, status.num_failed, status.num_finished) == (5, 0, 6)
    assert_all_free(made)


@pytest.mark.parametrize("run_ahead", [0, 1])
async def test_a_newcomer_need_not_wait_for_who_runs_most(house: Make, run_ahead: int) -> None:
    """With fair_preemption it runs long before any of theirs is done, and all get the tokens they would get anyway."""
    settings = {"fair_preemption": True}
    made = await house(num_slots=2, run_ahead=run_ahead, settings=settings, step_seconds=0.001)
    wanted = [request(f"g{index}", bytes([97 + index]) * 20, max_tokens=60, client="greedy") for index in range(3)]
    greedy = [asyncio.create_task(read(made.scheduler.submit(each))) for each in wanted]
    await until(lambda: made.scheduler.status().num_completion_tokens > 20)
    for number in range(3):
        modest = request(f"m{number}", b"modest", max_tokens=4, client="modest")
        assert (await read(made.scheduler.submit(modest))).token_ids == {0: expected(modest)}
        assert not any(task.done() for task in greedy)
    answers = [await task for task in greedy]
    assert [answer.token_ids for answer in answers] == [{0: expected(each)} for each in wanted]
    assert sum(answer.finished.receipt.num_preemptions for answer in answers) == 3
    assert made.scheduler.status().num_preemptions == 0, "those are of blocks that run out"
    assert_all_free(made)


async def test_a_full_queue_loses_nobody_to_a_request_that_is_refused(house: Make) -> None:
    """Who would give way stays when the newcomer cannot be taken for another reason."""
    made = await house(num_slots=1, settings={"max_waiting": 3}, step_seconds=0.001)
    greedy = [made.scheduler.submit(request(f"g{index}", max_tokens=4, client="greedy")) for index in range(4)]
    made.scheduler.advance()
    bad = request(
        "m0", max_tokens=8, client="modest", resume={0: (104, 0, 101)}, stop=StopParams(token_ids=frozenset({0}))
    )
    with pytest.raises(InvalidRequestError):
        made.scheduler.submit(bad)
    with pytest.raises(GraphNotReadyError):
        made.scheduler.submit(request("m1", client="modest", graph_policy=GraphPolicy(GraphMode.REQUIRE)))
    for stream in greedy:
        await read(stream)


async def test_a_request_id_in_flight_is_refused(house: Make) -> None:
    """Two requests with one id do not run at once; after the first one ended the id is free."""
    made = await house()
    stream = made.scheduler.submit(request("same"))
    with pytest.raises(DuplicateRequestError):
        made.scheduler.submit(request("same"))
    await read(stream)
    await read(made.scheduler.submit(request("same")))


async def test_prompt_and_completion_must_fit_the_context(house: Make) -> None:
    """The last request that fits runs; one more token is refused."""
    made = await house(context_length=32, num_blocks=9, block_size=4)
    await read(made.scheduler.submit(request(prompt=b"x" * 20, max_tokens=12)))
    with pytest.raises(ContextLengthError):
        made.scheduler.submit(request(prompt=b"x" * 20, max_tokens=13))


async def test_drain_finishes_what_is_there_and_admits_no_more(house: Make) -> None:
    """Running and waiting requests complete; new ones are told to go elsewhere; then it is idle."""
    made = await house(num_slots=1, step_seconds=0.001)
    reading = [asyncio.create_task(read(made.scheduler.submit(request(f"r{i}", max_tokens=6)))) for i in range(3)]
    made.scheduler.drain()
    with pytest.raises(DrainingError):
        made.scheduler.submit(request("late"))
    await made.scheduler.wait_idle()
    for answer in await asyncio.gather(*reading):
        assert answer.token_ids == {0: expected(request(max_tokens=6))}


async def test_end_all_ends_everything_with_the_error(house: Make) -> None:
    """What was received is delivered, then the error."""
    made = await house(num_slots=1, step_seconds=0.001)
    streams = [made.scheduler.submit(request(f"r{index}", max_tokens=500)) for index in range(2)]
    await anext(streams[0])
    made.scheduler.end_all(DrainingError("stopping", retry_after_seconds=1))
    for stream in streams:
        with pytest.raises(DrainingError):
            await read(stream)
    await made.scheduler.wait_idle()
    assert_all_free(made)


async def test_an_engine_failure_ends_all_and_is_told(house: Make) -> None:
    """Every request in flight gets the engine's error, later ones too, and the daemon hears of it once."""
    made = await house()
    told: list[HotgraphError] = []
    made.scheduler.on_failure = told.append
    made.engine.fail_step(4)
    streams = [made.scheduler.submit(request(f"r{index}", max_tokens=100)) for index in range(2)]
    for stream in streams:
        with pytest.raises(EngineFailedError):
            await read(stream)
    with pytest.raises(EngineFailedError):
        made.scheduler.submit(request("late"))
    assert len(told) == 1


class Lost(FakeBackend):
    """A backend on a device that is lost."""

    def capture(self, name: str, work: Callable[[], None]) -> FakeCaptured:
        raise DeviceLostError("the device is lost")


async def test_a_device_that_a_capture_finds_lost_is_told(house: Make) -> None:
    """Nobody waits for a request to fail of it: what runs ends, what comes is refused, and the daemon hears of it once."""
    made = await house(backend=Lost(), step_seconds=0.001)
    told: list[HotgraphError] = []
    made.scheduler.on_failure = told.append
    stream = made.scheduler.submit(request("r", max_tokens=500))  # its first miss asks for a capture
    with pytest.raises(EngineFailedError):
        await read(stream)
    with pytest.raises(EngineFailedError):
        made.scheduler.submit(request("late"))
    assert len(told) == 1


async def test_a_row_that_is_not_finite_fails_alone(house: Make) -> None:
    """Its request ends with an internal error that names no cause; the others in the step go on."""
    made = await house()
    bad = made.scheduler.submit(request("bad", b"bad", max_tokens=20))
    good = made.scheduler.submit(request("good", b"good", max_tokens=20))
    made.engine.fail_rows(3, [0])
    with pytest.raises(InternalError):
        await read(bad)
    assert (await read(good)).token_ids == {0: expected(request("good", b"good", max_tokens=20))}
    assert_all_free(made)


@pytest.mark.parametrize("cut", [0, 1, 7, 15])
async def test_a_resumed_request_goes_on_as_if_nothing_had_happened(house: Make, cut: int) -> None:
    """Tokens before and after the break add up to the unbroken answer, seeded choices included."""
    made = await house()
    wanted = request(max_tokens=16, num_choices=2, sampling=SamplingParams(seed=5))
    whole = [expected(wanted, index) for index in range(2)]
    resumed = request(max_tokens=16, num_choices=2, sampling=SamplingParams(seed=5), resume={1: tuple(whole[1][:cut])})
    answer = await read(made.scheduler.submit(resumed))
    assert answer.token_ids == {1: whole[1][cut:]}
    assert answer.text == {1: bytes(whole[1][cut:]).decode()}
    assert answer.finished.usage.completion_tokens == 16


async def test_a_resume_with_all_its_tokens_finishes_at_once(house: Make) -> None:
    """A choice whose last word was lost is told its end again, without a step."""
    made = await house()
    whole = expected(request(max_tokens=4))
    answer = await read(made.scheduler.submit(request(max_tokens=4, resume={0: tuple(whole)})))
    assert answer.token_ids == {0: []}
    assert answer.finished.choices[0].reason is FinishReason.LENGTH
    assert made.engine.batches == []


async def test_log_probabilities_come_one_for_each_token_and_as_many_as_asked_for(house: Make) -> None:
    """A step computes what its most demanding row wants; each request gets its own number of them."""
    made = await house()
    streams = [made.scheduler.submit(request(f"r{n}", num_logprobs=n, max_tokens=5)) for n in (0, 3)]
    for num_top, stream in zip((0, 3), streams, strict=True):
        events = [event async for event in stream if isinstance(event, TokensEvent)]
        logprobs = [item for event in events for item in event.logprobs]
        assert [item.chosen[0] for item in logprobs] == [i for event in events for i in event.token_ids]
        assert all(len(item.top) == num_top for item in logprobs)
    plain = [event async for event in made.scheduler.submit(request()) if isinstance(event, TokensEvent)]
    assert all(not event.logprobs for event in plain)


async def test_min_tokens_bans_the_end_of_text(house: Make) -> None:
    """The engine is told which tokens are banned, and the choice is at least so long."""
    made = await house(rule=echo_rule())
    answer = await read(made.scheduler.submit(request(prompt=b"ab", max_tokens=20, stop=StopParams(min_tokens=6))))
    assert len(answer.token_ids[0]) >= 6
    assert 256 not in answer.token_ids[0][:6]


async def test_a_graph_serves_once_it_is_captured_and_the_receipt_says_so(house: Make) -> None:
    """The first step of a shape is a miss and runs eagerly; later requests replay its graph."""
    made = await house()
    first = await read(made.scheduler.submit(request("a", max_tokens=4)))
    assert first.finished.receipt.num_eager_steps > 0
    await until(lambda: made.engine.graphs.stats().num_pending == 0)
    second = await read(made.scheduler.submit(request("b", max_tokens=4)))
    assert second.finished.receipt.num_eager_steps == 0
    assert all(group.graph for group in second.finished.receipt.step_groups)


async def test_eager_only_uses_no_graph(house: Make) -> None:
    """A request can ask for eager steps whatever is captured."""
    made = await house()
    for _ in range(2):
        policy = GraphPolicy(GraphMode.EAGER_ONLY)
        answer = await read(made.scheduler.submit(request(max_tokens=4, graph_policy=policy)))
        assert answer.finished.receipt.num_graph_steps == 0
        await until(lambda: made.engine.graphs.stats().num_pending == 0)


async def test_require_fails_fast_until_its_graphs_are_there(house: Make) -> None:
    """A request that requires graphs is refused with a delay, the captures are queued, and later it runs on them alone."""
    made = await house()
    policy = GraphPolicy(GraphMode.REQUIRE)
    with pytest.raises(GraphNotReadyError) as caught:
        made.scheduler.submit(request(sampling=GREEDY, graph_policy=policy))
    assert caught.value.retry_after_seconds > 0
    await until(lambda: made.engine.graphs.stats().num_pending == 0)
    answer = await read(made.scheduler.submit(request(sampling=GREEDY, graph_policy=policy)))
    assert answer.finished.receipt.num_eager_steps == 0


async def test_wait_up_to_runs_when_the_graphs_come_or_time_is_up(house: Make) -> None:
    """A request that may wait runs on graphs when they come in time, and without them when not."""
    made = await house(cache_thread=False)
    patient = GraphPolicy(GraphMode.WAIT_UP_TO, 30.0)
    reading = asyncio.create_task(read(made.scheduler.submit(request("a", sampling=GREEDY, graph_policy=patient))))
    await asyncio.sleep(0.02)
    assert made.engine.batches == []
    made.engine.graphs.run_pending()
    assert (await reading).finished.receipt.num_eager_steps == 0
    hasty = GraphPolicy(GraphMode.WAIT_UP_TO, 0.02)
    answer = await read(made.scheduler.submit(request("b", b"x" * 40, sampling=GREEDY, graph_policy=hasty)))
    assert answer.finished.receipt.num_eager_steps > 0
    assert answer.finished.timings.queue >= 0.02


async def test_a_reader_that_is_away_gets_its_tokens_together(house: Make) -> None:
    """Tokens gather in one event while nobody reads, and nothing else waits for the reader."""
    made = await house()
    slow = made.scheduler.submit(request("slow", max_tokens=10))
    await read(made.scheduler.submit(request("quick", max_tokens=30)))
    events = [event async for event in slow]
    assert len(events) == 2
    assert isinstance(events[0], TokensEvent)
    assert events[0].token_ids == expected(request(max_tokens=10))


async def test_close_ends_what_runs(house: Make) -> None:
    """Closing ends every stream with an error and leaves no step in flight."""
    made = await house(step_seconds=0.001)
    stream: RequestStream = made.scheduler.submit(request(max_tokens=500))
    await anext(stream)
    await made.scheduler.close()
    with pytest.raises(DrainingError):
        await read(stream)
    assert made.engine.num_outstanding == 0


async def test_a_stream_closed_by_its_reader_ends_as_cancelled(house: Make) -> None:
    """The error that ends a cancelled request is not raised to the reader who left."""
    made = await house(step_seconds=0.001)
    stream = made.scheduler.submit(request(max_tokens=500))
    stream.close()
    with pytest.raises((StopAsyncIteration, CancelledRequestError)):
        await anext(stream)
