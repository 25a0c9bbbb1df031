"""Tests of program.py: how a graph is compared with the eager step, alone and beside others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphcache import FakeBackend, GraphState
from hotgraph_server.batch import Sampler, StepKey
from tests.server.engine.conftest import MakeEngine
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
