"""Tests of program.py: how a graph is compared with the eager step, alone and beside others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from graphcache import DeviceLostError, Event, EventType, FakeBackend, GraphState
from graphcache.backends.fake import FakeCaptured
from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.request import SamplingParams
from tests.server.engine.conftest import MakeEngine
from tests.server.engine.driver import Driver, Track
from tests.server.engine.tiny_model import NUM_LAYERS, TinyModel

KEY = StepKey(4, 4, Sampler.GREEDY)
NUM_BLOCKS = 600


@pytest.mark.parametrize("is_idle", [True, False])
async def test_a_graph_is_replayed_alone_and_rehearsed_beside_others(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, is_idle: bool
) -> None:
    """While nothing is served verification replays the graph; beside steps it takes turns with them and replays nothing."""
    backend = FakeBackend()
    engine = await make_engine(backend=backend, num_blocks=NUM_BLOCKS)
    monkeypatch.setattr(engine._program, "_is_idle", lambda: is_idle)
    engine.graphs.request(KEY)
    (info,) = engine.graphs.wait([KEY], 20)
    assert info.state is GraphState.READY
    assert (backend.num_rehearsals > 0) == (not is_idle)
    assert backend.num_replays[info.name] == is_idle


async def test_a_rehearsed_graph_is_replayed_later(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was published beside others is replayed and compared as soon as nothing is served, once; a wrong one goes."""

    class Stale(FakeBackend):
        """Its graphs do nothing, however well the rehearsal went."""

        def capture(self, name: str, work: Callable[[], None]) -> FakeCaptured:
            return super().capture(name, work if name == str(other) else lambda: None)

    other = StepKey(2, 2, Sampler.GREEDY)
    backend = Stale()
    engine = await make_engine(backend=backend, num_blocks=NUM_BLOCKS)
    is_idle = False
    monkeypatch.setattr(engine._program, "_is_idle", lambda: is_idle)
    loop, second, looked_at = asyncio.get_running_loop(), asyncio.Event(), []

    def listen(event: Event[StepKey]) -> None:
        if event.type in (EventType.VERIFIED, EventType.QUARANTINED) and is_idle and event.graph is not None:
            looked_at.append(event.graph.key)
            if len(looked_at) == 2:
                loop.call_soon_threadsafe(second.set)

    engine.graphs.add_listener(listen)
    for key in (KEY, other):
        engine.graphs.request(key)
    assert {info.state for info in engine.graphs.wait([KEY, other], 20)} == {GraphState.READY}
    is_idle = True
    async with asyncio.timeout(20):
        await second.wait()
    assert looked_at == [KEY, other]
    assert engine.graphs.get(str(KEY)).state is GraphState.QUARANTINED
    assert engine.graphs.get(str(other)).state is GraphState.READY
    await asyncio.sleep(0.1)
    assert (backend.num_replays[str(KEY)], backend.num_replays[str(other)]) == (1, 1)


async def test_a_rehearsal_is_not_repeated(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again beside others it says the same without any work, until the graph is captured anew."""
    backend = FakeBackend()
    engine = await make_engine(backend=backend, num_blocks=NUM_BLOCKS)
    monkeypatch.setattr(engine._program, "_is_idle", lambda: False)
    for num_captures in (1, 2):
        engine.graphs.request(KEY)
        engine.graphs.wait([KEY], 20)
        assert backend.num_rehearsals == num_captures
        assert engine._program.verify(KEY, lambda: None) is None
        assert backend.num_rehearsals == num_captures
        engine.graphs.evict(str(KEY))


class Dying(FakeBackend):
    """The first replay of a graph loses the device, which the next work on it finds out."""

    is_lost = False

    def capture(self, name: str, work: Callable[[], None]) -> FakeCaptured:
        captured = super().capture(name, work)

        def die() -> None:
            self.is_lost = True
            raise OSError("an illegal memory access was encountered")

        captured.replay = die  # type: ignore[method-assign]
        return captured

    def warm_up(self, work: Callable[[], None]) -> None:
        if self.is_lost:
            raise DeviceLostError("gone")
        super().warm_up(work)


async def test_a_verification_notices_a_lost_device(make_engine: MakeEngine) -> None:
    """When a replay fails the device is asked; if it is lost the cache is, and says so."""
    engine = await make_engine(backend=Dying(), num_blocks=NUM_BLOCKS)
    engine.graphs.request(KEY)
    (info,) = engine.graphs.wait([KEY], 20)
    assert info.state is GraphState.FAILED
    assert engine.graphs.lost is not None


async def test_all_that_runs_apart_gives_way(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager run before a capture, what is recorded, and a rehearsal may be cut after every layer; live steps may not."""
    backend = FakeBackend()
    engine = await make_engine(backend=backend, num_blocks=NUM_BLOCKS)
    monkeypatch.setattr(engine._program, "_is_idle", lambda: False)
    engine.graphs.request(KEY)
    engine.graphs.wait([KEY], 20)
    assert backend.num_turns == 2 * NUM_LAYERS  # a fake capture does not run the work
    await Driver(engine, seed=1).run([Track((3, seed)) for seed in range(4)], 4, is_eager=True)
    assert backend.num_turns == 2 * NUM_LAYERS
    await Driver(engine, seed=1).run([Track((3, seed)) for seed in range(4)], 4)
    num_replays = backend.num_replays[str(KEY)]
    assert num_replays > 0  # which a fake does by running the work
    pending = engine.graphs.list([GraphState.QUEUED, GraphState.CAPTURING])
    engine.graphs.wait([info.key for info in pending], 20)
    num_others = len(engine.graphs.list([GraphState.READY])) - 1
    assert backend.num_turns >= (2 + num_replays + 2 * num_others) * NUM_LAYERS


async def test_what_older_steps_left_is_not_compared(make_engine: MakeEngine) -> None:
    """After steps that computed log-probabilities, a graph that computes none is as good as before."""
    engine = await make_engine(backend=FakeBackend(), num_blocks=NUM_BLOCKS)
    filtered = SamplingParams(temperature=1.0, top_k=5)
    for token_id in (3, 4):  # the second time with the graphs of the first
        await Driver(engine, seed=1).run([Track((token_id, 5), filtered, seed) for seed in range(4)], 6, num_logprobs=3)
        pending = engine.graphs.list([GraphState.QUEUED, GraphState.CAPTURING])
        engine.graphs.wait([info.key for info in pending], 20)
    for sampler in Sampler:
        key = StepKey(2, 2, sampler)
        engine.graphs.request(key)
        (info,) = engine.graphs.wait([key], 20)
        assert info.state is GraphState.READY, info.failure


class Forgetful(FakeBackend):
    """Its rehearsals do nothing."""

    def rehearse(self, work: Callable[[], None]) -> None:
        super().rehearse(lambda: None)


class Wrong(FakeBackend):
    """Its rehearsals run with another head."""

    def __init__(self, model: TinyModel) -> None:
        super().__init__()
        self._model = model

    def rehearse(self, work: Callable[[], None]) -> None:
        head = self._model.head
        self._model.head = head.flip(1)
        super().rehearse(work)
        self._model.head = head


@pytest.mark.parametrize("way", ["nothing", "another"])
async def test_a_rehearsal_that_differs_keeps_a_graph_from_serving(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Results that are not the eager ones, or none at all, quarantine the key; the next key is verified as ever."""
    model = TinyModel()
    backend = Forgetful() if way == "nothing" else Wrong(model)
    engine = await make_engine(model, backend=backend, num_blocks=NUM_BLOCKS)
    is_idle = False
    monkeypatch.setattr(engine._program, "_is_idle", lambda: is_idle)
    engine.graphs.request(KEY)
    (info,) = engine.graphs.wait([KEY], 20)
    assert info.state is GraphState.QUARANTINED
    is_idle = True
    other = StepKey(2, 2, Sampler.GREEDY)
    engine.graphs.request(other)
    (info,) = engine.graphs.wait([other], 20)
    assert info.state is GraphState.READY
