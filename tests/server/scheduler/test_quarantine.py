"""Who is suspected, tried, refused and forgotten, over several lives of a scheduler on a fake engine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from graphcache import FakeClock
from hotgraph_server.errors import EngineFailedError, InternalError
from hotgraph_server.request import Request, SamplingParams, StopParams
from hotgraph_server.scheduler import open_quarantine
from hotgraph_server.scheduler.quarantine import MEMORY_SECONDS, TRIAL_TOKENS, Quarantine, digest_of

from .conftest import House, read, request

Live = Callable[[], Awaitable[House]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "crashes"


@pytest_asyncio.fixture
async def live(house: Callable[..., Awaitable[House]], path: Path) -> AsyncIterator[Live]:
    """Another life of the daemon on the same record; the one before is over then."""
    records: list[Quarantine] = []
    clock = FakeClock()

    async def begin() -> House:
        if records:
            records.pop().close()
        made = await house(num_slots=8)
        made.scheduler.quarantine = open_quarantine(path, clock)
        assert made.scheduler.quarantine is not None
        records.append(made.scheduler.quarantine)
        return made

    yield begin
    records.pop().close()


async def die(made: House, *requests: Request, step: int | None = None) -> None:
    """The requests run, and the engine fails at its next step, or at the step given."""
    made.engine.fail_step(len(made.engine.batches) if step is None else step)
    streams = [made.scheduler.submit(one) for one in requests]
    for stream in streams:
        with pytest.raises(EngineFailedError):
            await read(stream)


def quarantine(made: House) -> Quarantine:
    assert made.scheduler.quarantine is not None
    return made.scheduler.quarantine


async def test_third_time_is_refused(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    """A request that was there at two crashes, the second time on trial, is refused with the incident of the log."""
    poison = request("poison", prompt=b"poison")
    await die(await live(), poison)
    made = await live()
    assert (quarantine(made).num_suspects, quarantine(made).num_convicted) == (1, 0)
    await die(made, poison)
    with caplog.at_level(logging.ERROR):
        made = await live()
    assert (quarantine(made).num_suspects, quarantine(made).num_convicted) == (0, 1)
    for seed in (1, 2):
        again = dataclasses.replace(poison, request_id="again", sampling=SamplingParams(seed=seed))
        with pytest.raises(InternalError) as caught:
            made.scheduler.submit(again)
        assert caught.value.incident in caplog.text
    assert quarantine(made).num_refused == 2
    await read(made.scheduler.submit(request("other", prompt=b"other")))


async def test_who_ran_beside_is_served(live: Live) -> None:
    """Of eight that ran at both crashes only the one on trial at the second is refused; each of the others is served."""
    many = [request(f"r{n}", prompt=bytes([97 + n]) * 5, max_tokens=30) for n in range(8)]
    await die(await live(), *many)
    made = await live()
    assert quarantine(made).num_suspects == 8
    await die(made, *many)
    assert [len(batch.rows) for batch in made.engine.batches] == [1], "one at a time"
    made = await live()
    assert quarantine(made).num_convicted == 1
    served = []
    for one in many:
        try:
            served.append(made.scheduler.submit(one))
        except InternalError:
            assert one is many[0]
    for stream in served:
        await read(stream)
    assert quarantine(made).num_suspects == 0, "who finishes is suspected no more"


async def test_trials_are_one_at_a_time_and_short(live: Live) -> None:
    """Suspects come in one after the other, each after the first tokens of the one before; others run beside them."""
    many = [request(f"r{n}", prompt=bytes([97 + n]) * 5, max_tokens=40) for n in range(3)]
    await die(await live(), *many)
    made = await live()
    streams = [made.scheduler.submit(one) for one in (*many, request("fresh", prompt=b"fresh", max_tokens=40))]
    for stream in streams:
        await read(stream)
    num_rows = [len(batch.rows) for batch in made.engine.batches]
    assert num_rows[:TRIAL_TOKENS] == [2] * TRIAL_TOKENS
    assert num_rows[TRIAL_TOKENS : 2 * TRIAL_TOKENS] == [3] * TRIAL_TOKENS
    assert num_rows[2 * TRIAL_TOKENS] == 4


async def test_a_late_crash_is_found_at_the_third(live: Live) -> None:
    """When the crash comes long after the trial, all that ran are tried to their ends next, and then one is refused."""
    many = [request(f"r{n}", prompt=bytes([97 + n]) * 5, max_tokens=40) for n in range(3)]
    await die(await live(), *many, step=25)
    await die(await live(), *many, step=30)
    made = await live()
    assert quarantine(made).num_suspects == 3
    await die(made, *many, step=30)
    assert max(len(batch.rows) for batch in made.engine.batches) == 1
    made = await live()
    assert (quarantine(made).num_suspects, quarantine(made).num_convicted) == (2, 1)


async def test_who_leaves_makes_room_for_the_next_trial(live: Live) -> None:
    """A suspect that is given up holds up nobody, and stays a suspect."""
    first, second = (request(name, prompt=name.encode(), max_tokens=40) for name in ("first", "second"))
    await die(await live(), first, second)
    made = await live()
    one, other = (made.scheduler.submit(suspect) for suspect in (first, second))
    made.scheduler.advance()
    one.close()
    await read(other)
    assert quarantine(made).num_suspects == 1


async def test_it_is_forgotten(path: Path, house: Callable[..., Awaitable[House]]) -> None:
    """After an hour a refused request is tried like any other; so it is after the host was started anew."""
    clock = FakeClock()
    poison = request("poison", prompt=b"poison")
    for _ in range(2):
        made = await house()
        made.scheduler.quarantine = open_quarantine(path, clock)
        await die(made, poison)
        quarantine(made).close()
    made = await house()
    made.scheduler.quarantine = open_quarantine(path, clock)
    assert quarantine(made).num_convicted == 1
    clock.advance(MEMORY_SECONDS)
    await read(made.scheduler.submit(poison))
    assert quarantine(made).num_convicted == 0
    quarantine(made).close()


async def test_a_good_end_leaves_no_suspects(live: Live) -> None:
    """A life in which requests finished, were cancelled or ran until the daemon stopped says nothing against them."""
    made = await live()
    await read(made.scheduler.submit(request("done")))
    cancelled = made.scheduler.submit(request("cancelled"))
    made.scheduler.advance()
    cancelled.close()
    made.scheduler.submit(request("stopped", max_tokens=500))
    made.scheduler.advance()
    await made.scheduler.close()
    assert quarantine(await live()).num_suspects == 0


def test_what_makes_a_request_the_same() -> None:
    """Id, caller, time, seed and resumed tokens do not count; what is asked does, field by field."""
    base = request("a", prompt=b"hello", max_tokens=8)
    same = dataclasses.replace(
        base,
        request_id="b",
        client="c",
        session_key="d",
        deadline=5.0,
        sampling=SamplingParams(seed=7),
        resume={0: (1,)},
    )
    assert digest_of(same) == digest_of(base)
    others: list[dict[str, object]] = [
        {"prompt_token_ids": tuple(b"hellp")},
        {"max_tokens": 9},
        {"sampling": SamplingParams(temperature=0.0)},
        {"sampling": SamplingParams(logit_bias={1: 2.0})},
        {"stop": StopParams(strings=("x",))},
        {"stop": StopParams(token_ids=frozenset({3}))},
        {"num_choices": 2},
        {"num_logprobs": 1},
    ]
    digests = {digest_of(dataclasses.replace(base, **change)) for change in others}  # type: ignore[arg-type]
    assert len(digests | {digest_of(base)}) == len(others) + 1


def test_a_record_that_cannot_be_used_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The daemon serves without it, and says so."""
    assert open_quarantine(None, FakeClock()) is None
    assert caplog.text == ""
    assert open_quarantine(tmp_path / "none" / "crashes", FakeClock()) is None
    assert open_quarantine(Path("/dev/full"), FakeClock()) is None
    assert caplog.text.count("cannot be used") == 2
