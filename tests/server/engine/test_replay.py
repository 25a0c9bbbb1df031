"""Receipts tell how a step ran: hit, larger graph, miss, or no look at the cache at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphcache import CacheSettings, FakeBackend, FakeClock, GraphCache, GraphState
from hotgraph_server.batch import Batch, Phase, Row, Sampler, StepKey
from hotgraph_server.engine.buckets import Buckets
from hotgraph_server.engine.replay import GraphChooser


class Program:
    """Nothing to do."""

    def bind(self, key: StepKey) -> Callable[[], None]:
        return lambda: None

    def verify(self, key: StepKey, replay: Callable[[], None]) -> bool:
        return True


class Bench:
    """A chooser on a cache without a thread."""

    def __init__(self, *, is_padded: bool = True) -> None:
        self.clock = FakeClock()
        self.backend = FakeBackend(self.clock)
        self.cache: GraphCache[StepKey] = GraphCache(
            Program(), self.backend, CacheSettings(), clock=self.clock, thread=False
        )
        self.cache.start()
        buckets = Buckets(num_slots=8, max_step_tokens=64, max_padding_ratio=2.0)
        self.chooser = GraphChooser(self.cache, buckets, self.clock, is_padded=is_padded)

    def capture(self, *keys: StepKey) -> None:
        for key in keys:
            self.cache.request(key)
        self.cache.run_pending()


def decode(num_rows: int, *, is_eager: bool = False) -> Batch:
    """A decode step."""
    return Batch(0, [Row(slot, 5, 1, None, True) for slot in range(num_rows)], is_eager=is_eager)


def test_a_graph_that_cannot_be_launched_is_withdrawn() -> None:
    """The step keeps its shape and counts as a miss; the graph serves nobody any more, and is destroyed."""
    bench = Bench()
    key = StepKey(8, 8, Sampler.GREEDY)
    bench.capture(key)
    choice = bench.chooser.choose(decode(5))
    assert choice.graph is not None
    choice = bench.chooser.withdraw(choice, "broken")
    assert (choice.graph, choice.tokens, choice.rows) == (None, 8, 8)
    receipt = bench.chooser.finish(decode(5), choice, 0.25)
    assert (receipt.graph, receipt.tokens_bucket) == ("", 8)
    assert bench.cache.get(str(key)).state is GraphState.QUARANTINED
    bench.cache.run_pending()
    assert bench.cache.budget().retiring_bytes == 0


def test_miss_runs_eagerly_and_asks_for_the_graph() -> None:
    """Without a graph the receipt is eager and exact, the miss is counted, and the graph is captured next."""
    bench = Bench()
    choice = bench.chooser.choose(decode(5))
    assert choice.graph is None
    receipt = bench.chooser.finish(decode(5), choice, 0.25)
    assert (receipt.graph, receipt.tokens_bucket, receipt.rows_bucket) == ("", 5, 5)
    assert (receipt.num_tokens, receipt.num_rows, receipt.phase) == (5, 5, Phase.DECODE)
    assert receipt.graph_age_seconds is None
    assert receipt.seconds == 0.25
    bench.cache.run_pending()
    info = bench.cache.get("t5-r5-greedy")
    assert (info.state, info.num_misses, info.num_hits) == (GraphState.READY, 1, 0)
    assert info.eager_seconds == 0.25


def test_hit_tells_graph_and_age() -> None:
    """With its graph ready a step replays it; the receipt names it, its bucket and its age, and the hit is counted."""
    bench = Bench()
    bench.capture(StepKey(5, 5, Sampler.GREEDY))
    bench.clock.advance(3.0)
    choice = bench.chooser.choose(decode(5))
    assert choice.graph is not None
    assert choice.graph.is_in_use
    receipt = bench.chooser.finish(decode(5), choice, 0.1)
    assert not choice.graph.is_in_use
    assert (receipt.graph, receipt.tokens_bucket, receipt.rows_bucket) == ("t5-r5-greedy", 5, 5)
    assert receipt.graph_age_seconds == pytest.approx(3.0)
    assert bench.cache.get("t5-r5-greedy").num_hits == 1


@pytest.mark.parametrize("is_padded", [True, False])
def test_larger_graph_serves_and_the_right_one_is_asked_for(is_padded: bool) -> None:
    """The next larger ready graph within the ratio is used; padding is told only where it is computed."""
    bench = Bench(is_padded=is_padded)
    bench.capture(StepKey(8, 8, Sampler.FILTERED), StepKey(7, 7, Sampler.GREEDY))
    receipt = bench.chooser.finish(decode(5), bench.chooser.choose(decode(5)), 0.1)
    assert receipt.graph == "t7-r7-greedy"
    assert (receipt.tokens_bucket, receipt.rows_bucket) == ((7, 7) if is_padded else (5, 5))
    bench.cache.run_pending()
    assert bench.cache.get("t5-r5-greedy").state is GraphState.READY
    bench.cache.evict("t5-r5-greedy")
    bench.cache.evict("t7-r7-greedy")
    bench.cache.run_pending()
    # A graph that can do more sampling will do; one beyond the ratio will not.
    assert bench.chooser.finish(decode(5), bench.chooser.choose(decode(5)), 0.1).graph == "t8-r8-filtered"
    assert bench.chooser.choose(decode(3)).graph is None


def test_only_a_step_that_misses_is_shared_with_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is told of a step without its graph before that is launched; not of a hit, nor of one that must run eagerly."""
    bench = Bench()
    told: list[str] = []
    monkeypatch.setattr(bench.cache, "step_missing", lambda: told.append("missing"))
    bench.capture(StepKey(5, 5, Sampler.GREEDY))
    for batch in (decode(5), decode(6, is_eager=True)):
        bench.chooser.finish(batch, bench.chooser.choose(batch), 0.1)
    assert not told
    bench.chooser.choose(decode(6))
    assert told == ["missing"]


def test_eager_only_does_not_touch_the_cache() -> None:
    """A batch that must run eagerly does, though its graph is ready; neither hit nor miss is counted, nothing requested."""
    bench = Bench()
    bench.capture(StepKey(5, 5, Sampler.GREEDY))
    for num_rows in (5, 6):
        batch = decode(num_rows, is_eager=True)
        choice = bench.chooser.choose(batch)
        assert choice.graph is None
        assert bench.chooser.finish(batch, choice, 0.1).graph == ""
    bench.cache.run_pending()
    assert [info.name for info in bench.cache.list()] == ["t5-r5-greedy"]
    stats = bench.cache.stats()
    assert (stats.num_hits, stats.num_misses) == (0, 0)


def test_the_cache_is_told_when_a_step_is_launched() -> None:
    """A choice comes before the launch, and is told as such; `launched` after it."""
    bench = Bench()
    choice = bench.chooser.choose(decode(1))
    assert bench.backend.num_steps == {"before": 1}
    bench.chooser.launched()
    assert bench.backend.num_steps == {"before": 1, "after": 1}
    bench.chooser.finish(decode(1), choice, 0.1)
    assert bench.backend.num_steps == {"before": 1, "after": 1}


def test_failed_step_lets_go_of_its_graph() -> None:
    """A step that failed leaves no hold on the graph, so that it can be destroyed, and counts as nothing."""
    bench = Bench()
    bench.capture(StepKey(5, 5, Sampler.GREEDY))
    choice = bench.chooser.choose(decode(5))
    assert choice.graph is not None
    bench.chooser.abandon(choice)
    assert not choice.graph.is_in_use
    assert bench.cache.get("t5-r5-greedy").num_hits == 0
