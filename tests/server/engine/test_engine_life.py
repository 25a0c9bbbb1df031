"""TorchEngine's life: steps ahead, graphs and receipts, failure, verification, close."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import threading
from collections.abc import Callable

import pytest
import torch

from graphcache import EagerBackend, FakeBackend, GraphState
from graphcache.backends.fake import FakeCaptured
from hotgraph_server.batch import Batch, Row, Sampler, StepKey
from hotgraph_server.engine import TorchEngine
from hotgraph_server.engine.engine import warm_up_steps
from hotgraph_server.engine.program import MEMORY_WAITS_SECONDS
from hotgraph_server.errors import EngineFailedError, ModelLoadError
from hotgraph_server.kernels.tile_rows_cuts import MAX_ROWS, ROOMS, room_for
from hotgraph_server.request import SamplingParams
from tests.server.engine.conftest import MakeEngine, tiny_settings
from tests.server.engine.driver import Driver, Track
from tests.server.engine.tiny_model import Tiny, TinyModel

GREEDY = SamplingParams(temperature=0.0)


async def test_steps_ahead_give_the_same_tokens(make_engine: MakeEngine) -> None:
    """With run_ahead 1 step n + 1 is submitted before n is read, and the tokens are those of the engine without."""
    sampling = SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.2)
    plain = Track((1, 2, 3), sampling, seed=5)
    await Driver(await make_engine()).run([plain], 9)

    engine = await make_engine(run_ahead=1)
    driver = Driver(engine)
    ahead = driver.admit(Track((1, 2, 3), sampling, seed=5))
    parts: list[tuple[Track, int | None]] = [(ahead, None)]
    earlier = driver.batch([(ahead, 3)])
    pending = engine.step(earlier)
    for _ in range(8):
        later = driver.batch(parts)
        later_pending = engine.step(later)
        driver.take(parts, earlier, await pending)
        earlier, pending = later, later_pending
    driver.take(parts, earlier, await pending)
    assert ahead.completion == plain.completion


async def test_too_many_outstanding_steps_are_refused(make_engine: MakeEngine) -> None:
    """Without steps ahead a second step before the first is done is an AssertionError."""
    engine = await make_engine()
    driver = Driver(engine)
    sequence = driver.admit(Track((1, 2, 3)))
    first = engine.step(driver.batch([(sequence, 3)]))
    with pytest.raises(AssertionError, match="outstanding"):
        engine.step(driver.batch([(sequence, None)]))
    await first


async def test_a_start_that_is_given_up_is_closed_like_any_other() -> None:
    """When the daemon is to end while the engine allocates, closing waits for that and leaves no thread."""
    gate, entered = threading.Event(), threading.Event()

    class Slow(TinyModel):
        def arena(self, max_tokens: int, max_rows: int) -> None:
            entered.set()
            assert gate.wait(10)

    engine = TorchEngine(Tiny(Slow()), tiny_settings())
    starting = asyncio.create_task(engine.start())
    await asyncio.to_thread(entered.wait, 10)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    gate.set()
    await asyncio.wait_for(closing, 10)
    assert not any(thread.name in ("forward", "graphcache-capture") for thread in threading.enumerate())


async def test_a_first_step_that_fails_is_a_model_that_does_not_load() -> None:
    """What the first step raises is told as ModelLoadError, and leaves no thread."""
    model = TinyModel()
    model.error = torch.OutOfMemoryError("no room")
    with pytest.raises(ModelLoadError, match="a first step failed"):
        await TorchEngine(Tiny(model), tiny_settings()).start()
    assert not any(thread.name in ("forward", "graphcache-capture") for thread in threading.enumerate())


@pytest.mark.parametrize(("num_slots", "max_step_tokens"), [(64, 512), (64, 32), (1, 16), (48, 48), (100, 2048)])
def test_the_steps_before_the_first_request(num_slots: int, max_step_tokens: int) -> None:
    """They fit the buffers, go through every sampler, and on a GPU through all orders of rows and the largest step."""
    for is_cuda in (False, True):
        steps = warm_up_steps(num_slots, max_step_tokens, is_cuda=is_cuda)
        assert {sampler for sampler, _ in steps} == set(Sampler)
        assert all(len(lengths) <= num_slots for _, lengths in steps)
        assert all(sum(lengths) <= max_step_tokens for _, lengths in steps)
    decoded = {len(lengths) for _, lengths in steps if set(lengths) == {1}}
    assert max(decoded) == min(num_slots, max_step_tokens)
    assert all(2 * smaller >= larger for smaller, larger in itertools.pairwise(sorted(decoded)))
    assert max(sum(lengths) for _, lengths in steps) == max_step_tokens
    longer = warm_up_steps(num_slots, max_step_tokens, is_cuda=True, is_invariant=True)
    assert longer[: len(steps)] == steps
    for found, most in ((steps, min(max_step_tokens, MAX_ROWS)), (longer, max_step_tokens)):
        prompts = {sum(lengths) for _, lengths in found if len(lengths) == 1}
        rooms = {room_for(num_tokens, is_normed=True) for num_tokens in prompts}
        assert rooms >= {room for room in ROOMS if room <= room_for(most, is_normed=True)}


async def test_receipts_tell_the_truth(make_engine: MakeEngine) -> None:
    """Misses become hits once captured: the receipt's graph is one the cache lists, and counts of both agree."""
    engine = await make_engine(backend=EagerBackend())
    driver = Driver(engine)
    await driver.run([Track((1, 2, 3)), Track((4, 5))], 6)
    engine.graphs.wait([info.key for info in engine.graphs.list()], 20)
    await driver.run([Track((1, 2, 3)), Track((4, 5))], 6)
    receipts = [output.receipt for output in driver.outputs]
    half = len(receipts) // 2
    assert receipts[0].graph == ""
    assert all(receipt.graph for receipt in receipts[half:])
    assert all((receipt.graph_age_seconds is not None) == bool(receipt.graph) for receipt in receipts)
    assert all((r.tokens_bucket, r.rows_bucket) == (r.num_tokens, r.num_rows) for r in receipts)
    assert all(receipt.seconds > 0 for receipt in receipts)
    stats = engine.graphs.stats()
    assert stats.num_hits == sum(bool(receipt.graph) for receipt in receipts)
    own = [engine.bucket(r.num_tokens, r.num_rows, Sampler.GREEDY) for r in receipts]
    assert stats.num_misses == sum(r.graph != str(key) for r, key in zip(receipts, own, strict=True))
    by_name = {info.name: info for info in engine.graphs.list()}
    for name in {receipt.graph for receipt in receipts if receipt.graph}:
        assert by_name[name].num_hits == sum(receipt.graph == name for receipt in receipts)
        assert by_name[name].state is GraphState.READY


async def test_eager_batches_use_no_graph(make_engine: MakeEngine) -> None:
    """EAGER_ONLY steps run eagerly though graphs are ready, with the same tokens, and leave no trace in the cache."""
    engine = await make_engine()
    first = Track((1, 2, 3), SamplingParams(temperature=1.0), seed=1)
    await Driver(engine).run([first], 5)
    engine.graphs.wait([info.key for info in engine.graphs.list()], 20)
    before = engine.graphs.stats()
    again = Track(first.prompt, first.sampling, first.seed)
    driver = Driver(engine)
    await driver.run([again], 5, is_eager=True)
    assert again.completion == first.completion
    assert all(output.receipt.graph == "" for output in driver.outputs)
    after = engine.graphs.stats()
    assert (after.num_hits, after.num_misses) == (before.num_hits, before.num_misses)


async def test_failure_is_for_good_and_logged_once(make_engine: MakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in a step becomes EngineFailedError for this and all later steps; one traceback is logged."""
    model = TinyModel()
    engine = await make_engine(model, run_ahead=1)
    driver = Driver(engine)
    sequence = Track((1, 2, 3))
    driver.admit(sequence)
    await driver.step([(sequence, 3)])
    model.error = MemoryError("no more")
    with caplog.at_level(logging.ERROR):
        steps = [engine.step(driver.batch([(sequence, None)])) for _ in range(2)]
        for step in steps:
            with pytest.raises(EngineFailedError) as failure:
                await step
            assert failure.value.retry_after_seconds > 0
            assert "no more" not in str(failure.value)
    model.error = None
    with pytest.raises(EngineFailedError):
        await engine.step(driver.batch([(sequence, None)]))
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None
    assert isinstance(caplog.records[0].exc_info[1], MemoryError)


async def test_a_step_without_memory_runs_again(make_engine: MakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    """What the device has no memory for at first costs a warning, and no token is another; if it never has, it ends."""
    plain = Track((1, 2, 3))
    await Driver(await make_engine()).run([plain], 6)

    model = TinyModel()
    engine = await make_engine(model)
    driver = Driver(engine)
    sequence = driver.admit(Track((1, 2, 3)))
    await driver.step([(sequence, 3)])
    with caplog.at_level(logging.WARNING):
        for num_errors in (1, 0, 2, 1, 1):
            model.errors = [torch.OutOfMemoryError("no room")] * num_errors
            await driver.step([(sequence, None)])
            assert not model.errors
    assert sequence.completion == plain.completion
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 5
    model.errors = [torch.OutOfMemoryError("no room")] * (1 + len(MEMORY_WAITS_SECONDS))
    with pytest.raises(EngineFailedError):
        await driver.step([(sequence, None)])


async def test_failed_replay_lets_go_of_its_graph(make_engine: MakeEngine) -> None:
    """A graph whose replay failed is not held for ever: closing does not wait for it."""
    model = TinyModel()
    engine = await make_engine(model)
    driver = Driver(engine)
    sequence = Track((1,))
    await driver.run([sequence], 2)
    key = StepKey(1, 1, Sampler.GREEDY)
    engine.graphs.wait([key], 20)
    graph = engine.graphs.lookup(key)
    assert graph is not None
    model.error = RuntimeError("lost")
    driver.admit(sequence)
    with pytest.raises(EngineFailedError):
        await driver.step([(sequence, 1)])
    assert not graph.is_in_use


class Unlaunchable(FakeBackend):
    """From `is_broken` on, no graph of it can be launched."""

    is_broken = False

    def capture(self, name: str, work: Callable[[], None]) -> FakeCaptured:
        captured = super().capture(name, work)
        replay = captured.replay

        def launch() -> None:
            if self.is_broken:
                raise RuntimeError("invalid argument")
            replay()

        captured.replay = launch  # type: ignore[method-assign]
        return captured


async def test_a_graph_that_cannot_be_launched_costs_no_answer(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its step runs what it was recorded from, with the same tokens; the graph goes, and its key is tried no more."""
    backend = Unlaunchable()
    engine = await make_engine(backend=backend, padding="always", num_blocks=600)
    plain = Track((1, 2, 3), SamplingParams(temperature=1.0), seed=1)
    await Driver(engine).run([plain], 5)
    engine.graphs.wait([info.key for info in engine.graphs.list()], 20)
    backend.is_broken = True
    again = Track((1, 2, 3), SamplingParams(temperature=1.0), seed=1)
    driver = Driver(engine)
    with caplog.at_level(logging.ERROR):
        await driver.run([again], 5)
    assert again.completion == plain.completion
    assert all(output.receipt.graph == "" for output in driver.outputs)
    assert "could not be launched" in caplog.text
    assert {info.state for info in engine.graphs.list()} == {GraphState.QUARANTINED}


async def test_a_replay_that_is_the_step_itself_is_not_run_twice(make_engine: MakeEngine) -> None:
    """Where nothing is launched, a replay that fails half way may have done half of it: the engine is beyond use."""
    model = TinyModel()
    engine = await make_engine(model, backend=EagerBackend())
    driver = Driver(engine)
    sequence = Track((1,))
    await driver.run([sequence], 2)
    engine.graphs.wait([StepKey(1, 1, Sampler.GREEDY)], 20)
    num_forwards = len(model.shapes)
    forward = model.forward

    def broken(*arguments: object, **options: object) -> torch.Tensor:
        forward(*arguments, **options)  # type: ignore[arg-type]
        raise MemoryError("half way")

    model.forward = broken  # type: ignore[method-assign]
    driver.admit(sequence)
    with pytest.raises(EngineFailedError):
        await driver.step([(sequence, 1)])
    assert len(model.shapes) == num_forwards + 1


async def test_oversized_batches_are_refused(make_engine: MakeEngine) -> None:
    """A batch larger than the static buffers is an AssertionError from step itself."""
    engine = await make_engine(num_slots=2, max_step_tokens=16)
    with pytest.raises(AssertionError, match="17 tokens"):
        engine.step(Batch(0, [Row(0, 0, 17, [0] * 17, True)]))
    with pytest.raises(AssertionError, match="3 rows"):
        engine.step(Batch(0, [Row(slot, 0, 1, [0], True) for slot in range(3)]))


async def test_close_ends_its_threads() -> None:
    """After close, outstanding steps are done and no thread of the engine is left; a second close does nothing."""
    before = set(threading.enumerate())
    engine = TorchEngine(Tiny(), tiny_settings(), run_ahead=1)
    await engine.start()
    driver = Driver(engine)
    sequence = driver.admit(Track((1, 2)))
    steps = [engine.step(driver.batch([(sequence, 2)])), engine.step(driver.batch([(sequence, None)]))]
    await engine.close()
    await engine.close()
    assert [(await step).step for step in steps] == [0, 1]
    left = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
    for thread in left:
        if thread.name == "hotgraph-blocking":  # it waited for the engine's own, and has told so: only its end is left
            thread.join(10)
    assert not [thread for thread in left if thread.is_alive() and not thread.name.startswith("asyncio")]


async def test_engine_that_never_started_closes() -> None:
    """close without start does nothing."""
    await TorchEngine(Tiny(), tiny_settings()).close()


async def test_torch_generators_are_never_drawn_from(make_engine: MakeEngine) -> None:
    """A whole run of every sampler leaves torch's random state as it was."""
    engine = await make_engine(backend=FakeBackend())
    before = torch.random.get_rng_state()
    for sampling in (GREEDY, SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.8)):
        await Driver(engine).run([Track((1, 2, 3), sampling)], 4)
    assert torch.equal(torch.random.get_rng_state(), before)


class WrongBackend(FakeBackend):
    """Its replays leave out the work for one name: what a broken capture would do."""

    broken = ""

    def capture(self, name: str, work: Callable[[], None]) -> FakeCaptured:
        return super().capture(name, (lambda: None) if name == self.broken else work)


async def test_verification_finds_a_wrong_graph_and_passes_right_ones(make_engine: MakeEngine) -> None:
    """A graph whose replay does not do the work is quarantined and never serves; right ones of all kinds are published,
    while steps are served in between with unchanged tokens."""
    backend = WrongBackend()
    backend.broken = "t2-r2-gumbel"
    engine = await make_engine(backend=backend)
    keys = [
        StepKey(tokens, rows, sampler)
        for tokens, rows in ((1, 1), (2, 2), (8, 1), (16, 2), (48, 8))
        for sampler in Sampler
    ]
    rng = random.Random(4)
    sequences = [Track((rng.randrange(97),) * 9, SamplingParams(temperature=1.0), seed) for seed in range(3)]
    expected = [Track(sequence.prompt, sequence.sampling, sequence.seed) for sequence in sequences]
    await Driver(engine).run(expected, 6, is_eager=True)
    for key in keys:
        engine.graphs.request(key)
    await Driver(engine).run(sequences, 6)
    engine.graphs.wait(keys, 30)
    assert [sequence.completion for sequence in sequences] == [sequence.completion for sequence in expected]
    states = {str(key): engine.graphs.get(str(key)).state for key in keys}
    assert states.pop("t2-r2-gumbel") is GraphState.QUARANTINED
    assert set(states.values()) == {GraphState.READY}
    assert engine.graphs.lookup(StepKey(2, 2, Sampler.GUMBEL)) is None
