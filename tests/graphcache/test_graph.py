"""Tests of graph.py and of the one method that moves a state, in entry.py."""

from __future__ import annotations

import itertools
import threading

import pytest

from graphcache import TRANSITIONS, FakeClock, Graph, GraphState, GraphStateError
from graphcache.entry import Entry
from graphcache.usage import Usage


def make_graph(wakes: list[str]) -> Graph[str]:
    return Graph(
        "a",
        "a",
        replay=lambda: None,
        size_bytes=1,
        publish_monotonic=0.0,
        usage=Usage(),
        wake=lambda: wakes.append("wake"),
    )


@pytest.mark.parametrize(("before", "after"), list(itertools.product(GraphState, GraphState)))
def test_only_listed_transitions_happen(before: GraphState, after: GraphState) -> None:
    """Every pair of states is either in the table and moves, or is refused and changes nothing."""
    entry = Entry("a", "a", FakeClock())
    entry.state = before
    if after in TRANSITIONS[before]:
        entry.move(after)
        assert entry.state is after
    else:
        with pytest.raises(GraphStateError, match=f"{before.value} to {after.value}"):
            entry.move(after)
        assert entry.state is before


def test_every_state_has_a_row_and_a_way_on() -> None:
    """The table has every state, none leads to itself, and no state is a dead end: a key can always be tried again."""
    assert set(TRANSITIONS) == set(GraphState)
    for before, afters in TRANSITIONS.items():
        assert before not in afters
        reached, frontier = {before}, {before}
        while frontier:
            frontier = {after for state in frontier for after in TRANSITIONS[state]} - reached
            reached |= frontier
        assert GraphState.READY in reached


def test_acquire_fails_once_retired() -> None:
    """A retired graph cannot be acquired, and the attempt leaves no use behind."""
    graph = make_graph([])
    graph.retire()
    assert not graph.acquire()
    assert not graph.is_in_use


def test_release_of_a_retired_graph_wakes() -> None:
    """The release that ends the fence wakes the capture thread; a release while published wakes nobody."""
    wakes: list[str] = []
    graph = make_graph(wakes)
    assert graph.acquire()
    graph.release()
    assert wakes == []
    assert graph.acquire()
    graph.retire()
    assert graph.is_in_use
    graph.release()
    assert wakes == ["wake"]
    assert not graph.is_in_use


def test_release_without_acquire_is_an_error() -> None:
    """One release too many is reported where it happens."""
    with pytest.raises(IndexError):
        make_graph([]).release()


def test_disarmed_graph_does_not_replay() -> None:
    """After the cache disarmed a graph its replay raises instead of touching freed memory."""
    graph = make_graph([])
    graph.disarm()
    with pytest.raises(GraphStateError, match="destroyed"):
        graph.replay()


def test_acquisitions_from_many_threads_are_counted_exactly() -> None:
    """After any number of acquire/release pairs on several threads the graph is unused."""
    graph = make_graph([])

    def use() -> None:
        for _ in range(2000):
            assert graph.acquire()
            graph.release()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not graph.is_in_use


def test_repr_tells_the_state() -> None:
    """repr shows name, state and uses."""
    graph = make_graph([])
    graph.acquire()
    assert repr(graph) == "Graph(a, published, 1 in use)"
    graph.retire()
    assert repr(graph) == "Graph(a, retired, 1 in use)"
    assert repr(Entry("a", "a", FakeClock())) == "Entry(a, evicted)"
