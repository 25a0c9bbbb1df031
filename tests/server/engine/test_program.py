"""Tests of program.py: how a graph is compared with the eager step, alone and beside others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphcache import FakeBackend, GraphState
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
    assert backend.num_rehearsals == (not is_idle)
    assert backend.num_replays[info.name] == is_idle
    assert backend.num_turns == NUM_LAYERS * (1 + backend.num_rehearsals)  # and those of the eager run before


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
