"""Tests of pending.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache import Priority
from graphcache.pending import PendingQueue


def drain(queue: PendingQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_priority_then_wishes_then_age() -> None:
    """Higher priorities go first, then what was wished for more often, then what is older."""
    queue: PendingQueue[str] = PendingQueue(10)
    queue.push("profile", Priority.PROFILE)
    queue.push("old", Priority.MISS)
    queue.push("young", Priority.MISS)
    queue.push("often", Priority.MISS)
    queue.raise_priority("often", Priority.MISS)
    queue.push("operator", Priority.OPERATOR)
    queue.push("waited", Priority.WAITED)
    assert [queue.num_ahead(key) for key in ("operator", "often", "profile")] == [0, 2, 5]
    assert drain(queue) == ["operator", "waited", "often", "old", "young", "profile"]


def test_a_wish_is_only_ever_raised() -> None:
    """A repeated wish keeps the highest priority it ever had."""
    queue: PendingQueue[str] = PendingQueue(10)
    queue.push("a", Priority.MISS)
    queue.push("b", Priority.MISS)
    queue.raise_priority("b", Priority.OPERATOR)
    queue.raise_priority("b", Priority.PROFILE)
    assert drain(queue) == ["b", "a"]


def test_the_least_wanted_leaves_a_full_queue() -> None:
    """A higher priority pushes the last of the lowest out; an equal or lower one finds no room."""
    queue: PendingQueue[str] = PendingQueue(2)
    assert queue.push("a", Priority.MISS) is None
    assert queue.push("b", Priority.MISS) is None
    assert not queue.has_room(Priority.PROFILE)
    assert not queue.has_room(Priority.MISS)
    assert queue.has_room(Priority.OPERATOR)
    assert queue.push("c", Priority.OPERATOR) == "b"
    assert "b" not in queue
    assert drain(queue) == ["c", "a"]


def test_an_unknown_key_is_estimated_as_a_new_miss() -> None:
    """num_ahead of a key that is not there counts all that a new miss would wait for."""
    queue: PendingQueue[str] = PendingQueue(10)
    queue.push("a", Priority.MISS)
    queue.push("b", Priority.PROFILE)
    assert queue.num_ahead("new") == 1


def test_empty() -> None:
    """Nothing can be taken from an empty queue, and clear gives everything."""
    queue: PendingQueue[str] = PendingQueue(10)
    with pytest.raises(IndexError):
        queue.pop()
    queue.push("a", Priority.MISS)
    assert queue.clear() == ["a"]
    assert len(queue) == 0


@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from(Priority)), max_size=40))
def test_never_more_than_its_bound_and_always_best_first(wishes: list[tuple[int, Priority]]) -> None:
    """Whatever is wished for, the queue keeps its bound, each key once, and priorities come out falling."""
    queue: PendingQueue[int] = PendingQueue(3)
    priorities: dict[int, Priority] = {}
    for key, priority in wishes:
        if key in queue:
            queue.raise_priority(key, priority)
            priorities[key] = max(priorities[key], priority)
        elif queue.has_room(priority):
            left = queue.push(key, priority)
            if left is not None:
                assert priorities.pop(left) < priority
            priorities[key] = priority
        assert len(queue) == len(priorities) <= 3
    order = [queue.pop() for _ in range(len(queue))]
    assert sorted(order) == sorted(priorities)
    assert [priorities[key] for key in order] == sorted(priorities.values(), reverse=True)
