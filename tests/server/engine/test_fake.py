"""FakeEngine keeps the contract of Engine: order, receipts, failures, time."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from graphcache import FakeBackend, FakeClock
from hotgraph_server.batch import Batch, BlockAppend, Row, Sampler, SlotAssignment
from hotgraph_server.engine import Engine, FakeEngine, History, TokenRule, echo_rule, hash_rule, script_rule
from hotgraph_server.errors import EngineFailedError
from hotgraph_server.request import SamplingParams
from tests.server.engine.driver import Driver, Track

GREEDY = SamplingParams(temperature=0.0)


async def open_engine(**options: object) -> FakeEngine:
    """A started engine."""
    engine = FakeEngine(**options)  # type: ignore[arg-type]
    await engine.start()
    return engine


def prefill(step: int = 0, slot: int = 0, prompt: bytes = b"abc") -> Batch:
    """A sequence's first step."""
    assignment = SlotAssignment(slot, GREEDY, 0, tuple(prompt), ())
    return Batch(step, [Row(slot, 0, len(prompt), tuple(prompt), True)], [assignment], [BlockAppend(slot, 0, slot + 1)])


def decode(step: int, position: int, slot: int = 0) -> Batch:
    """One decode row."""
    return Batch(step, [Row(slot, position, 1, None, True)])


async def test_completions_follow_the_rule() -> None:
    """Sequences in one batch, chunked prompts, get the rule's tokens for what each holds."""
    rules: list[TokenRule] = [echo_rule(), script_rule([1, 2, 3, 4]), hash_rule()]
    for rule in rules:
        engine: Engine = await open_engine(rule=rule, block_size=4, max_step_tokens=16)
        driver = Driver(engine)
        sequences = [Track(tuple(b"hello world"), GREEDY), Track(tuple(b"xy"), SamplingParams(), seed=9)]
        await driver.run(sequences, 3, chunk=5)
        for sequence in sequences:
            for said, token_id in enumerate(sequence.completion):
                history = driver_history(sequence, said)
                assert token_id == rule(history)
        await engine.close()


def driver_history(sequence: Track, said: int) -> History:
    """What the rule saw before it said token number `said`."""
    return History(sequence.prompt, tuple(sequence.completion[:said]), sequence.sampling, sequence.seed)


async def test_banned_tokens_are_not_said() -> None:
    """While a sequence is too short for a stop the rule's stop token is replaced; then it comes."""
    engine = await open_engine(rule=script_rule([]))
    sequence = Track((1, 2), banned_until=(5, (256,)))
    await Driver(engine).run([sequence], 5)
    assert 256 not in sequence.completion[:3]
    assert sequence.completion[3:] == [256, 256]
    await engine.close()


async def test_breach_is_raised_by_step_itself() -> None:
    """A batch against the contract raises AssertionError at once, not from the awaitable."""
    engine = await open_engine()
    with pytest.raises(AssertionError, match="not assigned"):
        engine.step(decode(0, 3))
    await engine.close()


async def test_only_so_many_steps_may_be_outstanding() -> None:
    """With run_ahead 1 two steps may be outstanding, a third is a breach; results come in order."""
    engine = await open_engine(run_ahead=1)
    engine.hold_step(0)
    first = engine.step(prefill())
    second = engine.step(decode(1, 3))
    assert engine.num_outstanding == 2
    with pytest.raises(AssertionError, match="outstanding"):
        engine.step(decode(2, 4))
    await engine.wait_held()
    engine.release()
    assert (await first).step == 0
    assert (await second).step == 1
    assert engine.num_outstanding == 0
    await engine.close()


async def test_failure_is_for_good(caplog: pytest.LogCaptureFixture) -> None:
    """The step asked to fail raises EngineFailedError, so do outstanding and later ones; the log has it once."""
    engine = await open_engine(run_ahead=2)
    engine.fail_step(1, OSError("the card fell out"))
    with caplog.at_level(logging.ERROR):
        steps = [engine.step(prefill()), engine.step(decode(1, 3)), engine.step(decode(2, 4))]
        assert (await steps[0]).token_ids != [None]
        for step in steps[1:]:
            with pytest.raises(EngineFailedError) as failure:
                await step
            assert failure.value.retry_after_seconds > 0
        with pytest.raises(EngineFailedError):
            await engine.step(decode(3, 5))
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None
    assert "the card fell out" in str(caplog.records[0].exc_info[1])
    await engine.close()


async def test_rows_that_fail_give_no_token() -> None:
    """A row made to fail is in failed_rows and has no token; the row beside it has one."""
    engine = await open_engine()
    engine.fail_rows(1, [1])
    await engine.step(prefill())
    first, second = prefill(1, 1), decode(1, 3)
    output = await engine.step(Batch(1, [*second.rows, *first.rows], first.assignments, first.block_appends))
    assert output.failed_rows == [1]
    assert output.token_ids[1] is None
    assert output.token_ids[0] is not None
    await engine.close()


async def test_time_passes_on_a_fake_clock_only() -> None:
    """With a FakeClock a step takes its time on that clock and hardly any real time; the receipt tells the clock's time."""
    clock = FakeClock()
    engine = await open_engine(clock=clock, step_seconds=lambda batch: 100.0 * batch.num_tokens)
    start = time.monotonic()
    output = await engine.step(prefill())
    assert clock.monotonic() == pytest.approx(300.0)
    assert output.receipt.seconds == pytest.approx(300.0)
    assert time.monotonic() - start < 30
    await engine.close()


async def test_receipts_go_from_miss_to_hit() -> None:
    """The first step of a shape is eager; once the capture is done the same shape replays the named graph, padded."""
    backend = FakeBackend()
    engine = await open_engine(backend=backend, cache_thread=False)
    output = await engine.step(prefill())
    assert (output.receipt.graph, output.receipt.tokens_bucket) == ("", 3)
    engine.graphs.run_pending()
    output = await engine.step(prefill(1, 1))
    assert (output.receipt.graph, output.receipt.tokens_bucket) == ("t8-r1-greedy", 8)
    assert output.receipt.graph_age_seconds is not None
    assert backend.num_replays["t8-r1-greedy"] == 1 + backend.needs_verification
    assert engine.bucket(3, 1, Sampler.GREEDY) == engine.graphs.get("t8-r1-greedy").key
    await engine.close()


async def test_logprobs_have_the_asked_for_length() -> None:
    """Made-up log-probabilities align with rows; the chosen token comes first."""
    engine = await open_engine()
    batch = prefill()
    output = await engine.step(
        Batch(0, batch.rows, batch.assignments, batch.block_appends, Sampler.FILTERED, num_logprobs=2)
    )
    (logprobs,) = output.logprobs
    assert logprobs is not None
    assert logprobs.chosen[0] == output.token_ids[0]
    assert len(logprobs.top) == 2
    await engine.close()


async def test_close_finishes_what_is_outstanding() -> None:
    """close waits for submitted steps, may be called twice, and ends the cache's thread."""
    engine = await open_engine(run_ahead=1)
    steps = [asyncio.ensure_future(engine.step(batch)) for batch in (prefill(), decode(1, 3))]
    await engine.close()
    await engine.close()
    assert [step.done() for step in steps] == [True, True]
    with pytest.raises(AssertionError):
        engine.step(decode(2, 4))


async def test_caller_that_leaves_harms_nobody() -> None:
    """A cancelled await loses the result only: the next step runs as if it had been read."""
    engine = await open_engine(rule=echo_rule(), run_ahead=1)
    engine.hold_step(0)

    async def read_first() -> None:
        await engine.step(prefill())

    task = asyncio.create_task(read_first())
    await engine.wait_held()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    engine.release()
    assert (await engine.step(decode(1, 3))).token_ids == [ord("b")]
    await engine.close()
