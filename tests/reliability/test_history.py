"""Nothing is lost, doubled or mixed up, however often the daemon is killed under its clients' streams."""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from hotgraph_client import (
    AsyncClient,
    Choice,
    ChoiceFinish,
    Completion,
    Finished,
    FinishReason,
    HotgraphError,
    Receipt,
    RetryableError,
    Started,
    Timings,
    Tokens,
    Usage,
)
from tests.integration.harness import PATIENCE_SECONDS, Caller, eventually
from tests.integration.processes import process
from tests.reliability.history import Record, reference, violations, violations_of_a_part, violations_of_an_answer
from tests.reliability.mix import ENDLESS
from tests.reliability.probe import percentile
from tests.reliability.victims import program, settings


@dataclass
class Outcome:
    """All requests, and how long the daemon was away after each kill: from SIGKILL to a served request, in seconds."""

    records: list[Record] = field(default_factory=list)
    away_seconds: list[float] = field(default_factory=list)
    num_resumes: int = 0
    num_resent: int = 0  # requests that failed before their first event

    @property
    def wrong(self) -> list[list[str]]:
        return [found for record in self.records if (found := violations(record))]


async def kill_again_and_again(num_kills: int, num_streams: int, *, resume: bool = True) -> Outcome:
    """Streams that follow each other on every one of so many callers, while the daemon is killed and started again.

    Half of them are greedy, half seeded. All that have begun are read to their end."""
    outcome = Outcome()
    chance = random.Random(11)
    is_over = asyncio.Event()
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        config = settings(folder, is_tcp=False, scheduler={"num_slots": 32, "max_waiting": 1000})
        address = config.server.listen[0]
        code = program(step_seconds=0.01)

        async def one(client: AsyncClient, number: int) -> None:
            prompt = tuple(chance.choices(range(97, 123), k=chance.randint(1, 40)))
            seed = number if number % 2 else None
            record = Record(prompt, max_tokens=chance.randint(20, 120), seed=seed)
            outcome.records.append(record)
            options: dict[str, Any] = {"temperature": 0.0} if seed is None else {"temperature": 1.0, "seed": seed}
            while True:
                generation = client.generate(list(prompt), max_tokens=record.max_tokens, resume=resume, **options)
                try:
                    async for event in generation:
                        record.events.append(event)
                except HotgraphError as error:
                    if isinstance(error, RetryableError) and not record.events and not is_over.is_set():
                        # When everybody fails at once gRPC's throttle forbids tries before the first event. The caller has
                        # one clear error, and had nothing: he asks again.
                        outcome.num_resent += 1
                        await asyncio.sleep(chance.uniform(0.1, 0.3))
                        continue
                    record.errors.append(error)
                break
            outcome.num_resumes += generation.num_resumes

        numbers = itertools.count()

        async def caller(client: AsyncClient) -> None:
            while not is_over.is_set():
                await one(client, next(numbers))

        clients = [AsyncClient(address, resume_policy=ENDLESS, wait_for_ready=True) for _ in range(10)]
        callers: list[asyncio.Task[None]] = []
        killed_time: float | None = None
        try:
            for round_number in range(num_kills + 1):
                async with process(config, code) as running:
                    await running.logged("serving fake")
                    async with Caller(address) as asking:
                        await asking.check_alive()
                        if killed_time is not None:
                            outcome.away_seconds.append(time.monotonic() - killed_time)
                        if not callers:
                            callers = [asyncio.create_task(caller(clients[n % 10])) for n in range(num_streams)]
                        if round_number < num_kills:

                            async def is_loaded(asking: Caller = asking) -> bool:
                                status = (await asking.status()).scheduler
                                return status.num_running + status.num_waiting >= num_streams // 2

                            # The load that the test stands for: no kill counts that hit an idle daemon.
                            await eventually(is_loaded)
                            await asyncio.sleep(chance.uniform(0, 0.7))
                            running.process.kill()
                            killed_time = time.monotonic()
                        else:
                            is_over.set()
                            await asyncio.wait_for(asyncio.gather(*callers), 3 * PATIENCE_SECONDS)
        finally:
            for task in callers:
                task.cancel()
            for client in clients:
                await client.close()
    return outcome


def told(outcome: Outcome) -> str:
    away = outcome.away_seconds
    return (
        f"{len(outcome.records)} requests, {outcome.num_resumes} resumes, {outcome.num_resent} sent again before their first"
        f" event, {len(outcome.wrong)} wrong; away p50 {percentile(away, 0.5):.2f} s, max {max(away):.2f} s of {len(away)}"
    )


async def test_nothing_is_lost_when_the_daemon_is_killed() -> None:
    """Killed twice under 30 streams: every request has all of its tokens once, in order, and one end."""
    outcome = await kill_again_and_again(2, 30)
    print(told(outcome))
    assert outcome.wrong == []
    assert outcome.num_resumes >= 30


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_nothing_is_lost_in_a_hundred_kills() -> None:
    """The same, 100 times under 100 streams."""
    outcome = await kill_again_and_again(100, 100)
    print(told(outcome))
    assert outcome.wrong == []
    assert outcome.num_resumes >= 2000


@pytest.mark.soak
async def test_without_resume_requests_are_lost() -> None:
    """The control: where clients do not go on, the history has holes, and they are found."""
    outcome = await kill_again_and_again(1, 20, resume=False)
    assert len(outcome.wrong) >= 10


def whole() -> Record:
    """A request as it should be, its tokens in three events."""
    record = Record((97, 98), 6, None)
    ids = reference(record)
    finish = ChoiceFinish(0, FinishReason.LENGTH)
    usage = Usage(prompt_tokens=2, completion_tokens=6, cached_prompt_tokens=0)
    record.events += [
        Started("id", "fake", 2, 0),
        Tokens(0, ids[:2], bytes(ids[:2]).decode()),
        Tokens(0, ids[2:4], bytes(ids[2:4]).decode()),
        Tokens(0, ids[4:], bytes(ids[4:]).decode(), finish=finish),
        Finished((finish,), usage, Timings(0, 0, 0, 0, None, 0), Receipt()),
    ]
    return record


def without(position: int) -> Callable[[Record], None]:
    return lambda record: record.events.__delitem__(position)


def doubled(position: int) -> Callable[[Record], None]:
    return lambda record: record.events.insert(position, record.events[position])


def swapped(record: Record) -> None:
    record.events[1:3] = reversed(record.events[1:3])


def other_token(record: Record) -> None:
    tokens = record.events[2]
    assert isinstance(tokens, Tokens)
    record.events[2] = replace(tokens, token_ids=(tokens.token_ids[0], tokens.token_ids[1] ^ 1))


def other_text(record: Record) -> None:
    tokens = record.events[2]
    assert isinstance(tokens, Tokens)
    record.events[2] = replace(tokens, text="?" + tokens.text[1:])


def failed(record: Record) -> None:
    record.errors.append(HotgraphError("no", code=None))


BREAKS: list[Callable[[Record], None]] = [
    *(without(position) for position in range(5)),
    *(doubled(position) for position in range(5)),
    swapped,
    other_token,
    other_text,
    failed,
]


def test_a_whole_history_has_nothing_wrong() -> None:
    """The checker finds nothing in what is as it should be."""
    assert violations(whole()) == []


@pytest.mark.parametrize("spoil", BREAKS)
def test_every_break_of_a_history_is_found(spoil: Callable[[Record], None]) -> None:
    """The checker's own control: an event that is missing, doubled, in the wrong place or not the right one is found."""
    record = whole()
    spoil(record)
    assert violations(record)


def test_a_part_of_a_whole_history_has_nothing_wrong() -> None:
    """However early a caller leaves, what came until then is right."""
    for num_events in range(6):
        record = whole()
        del record.events[num_events:]
        assert violations_of_a_part(record) == []


BREAKS_OF_A_PART = [without(0), without(1), doubled(0), doubled(2), doubled(4), swapped, other_token, other_text]


@pytest.mark.parametrize("spoil", BREAKS_OF_A_PART)
def test_every_break_of_a_part_is_found(spoil: Callable[[Record], None]) -> None:
    """What is wrong before the end is found though there is no end."""
    record = whole()
    spoil(record)
    assert violations_of_a_part(record)


def answer(token_ids: tuple[int, ...], text: str) -> Completion:
    """An answer to `whole`'s request, in one message."""
    choice = Choice(0, text, token_ids, (), ChoiceFinish(0, FinishReason.LENGTH))
    usage = Usage(prompt_tokens=2, completion_tokens=6, cached_prompt_tokens=0)
    return Completion("id", "fake", 0, (choice,), usage, Timings(0, 0, 0, 0, None, 0), Receipt())


def test_answers_are_checked_as_streams_are() -> None:
    """A whole answer with the right tokens passes; with a wrong one, or with a text that is another's, it does not."""
    record = Record((97, 98), 6, None)
    ids = reference(record)
    text = bytes(ids).decode()
    assert violations_of_an_answer(record, answer(ids, text)) == []
    assert violations_of_an_answer(record, answer((ids[0] ^ 1, *ids[1:]), text))
    assert violations_of_an_answer(record, answer(ids, "?" + text[1:]))
    assert record.events == []
