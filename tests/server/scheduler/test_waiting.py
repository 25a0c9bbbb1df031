"""Tests of scheduler/waiting.py."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.scheduler.waiting import WaitingQueue
from tests.server.scheduler.callers import OfCaller, of_caller


def take(queue: WaitingQueue[OfCaller], running: Counter[str]) -> OfCaller:
    """Takes the next one, which runs from then on."""
    found = queue.next(running.__getitem__)
    queue.remove(found, is_turn=True)
    running[found.ticket.request.client] += 1
    return found


def clients_in_turn(queue: WaitingQueue[OfCaller], running: Counter[str]) -> str:
    return "".join(take(queue, running).ticket.request.client for _ in range(len(queue)))


def test_one_callers_requests_keep_their_order() -> None:
    """First come, first served."""
    queue: WaitingQueue[OfCaller] = WaitingQueue()
    all_of_them = [of_caller("a") for _ in range(5)]
    for one in all_of_them:
        queue.append(one)
    assert [take(queue, Counter()) for _ in range(5)] == all_of_them
    assert not queue


def test_callers_take_turns() -> None:
    """Whoever runs least is next, then whose turn is longest ago, whatever the others have queued before."""
    queue: WaitingQueue[OfCaller] = WaitingQueue()
    for client in "aaaaabbc":
        queue.append(of_caller(client))
    assert clients_in_turn(queue, Counter(a=2)) == "bcbaaaaa"


def test_who_gave_way_comes_first() -> None:
    """A sequence that ran before is next, however much of its caller's runs."""
    queue: WaitingQueue[OfCaller] = WaitingQueue()
    queue.append(of_caller("b"))
    first, second = of_caller("a"), of_caller("a")
    queue.push_front(second)
    queue.push_front(first)
    running = Counter(a=9)
    assert [take(queue, running), take(queue, running)] == [first, second]
    assert queue.is_front(first) is False


def test_who_is_passed_over_keeps_its_place() -> None:
    """Taken out and put back, in the opposite order, the queue is what it was."""
    queue: WaitingQueue[OfCaller] = WaitingQueue()
    for client in "abcab":
        queue.append(of_caller(client))
    queue.push_front(of_caller("c"))
    before = list(queue)
    taken = []
    for _ in range(4):
        one = queue.next(lambda _: 0)
        taken.append((one, queue.is_front(one)))
        queue.remove(one)
    for one, is_front in reversed(taken):
        queue.put_back(one, is_front=is_front)
    assert list(queue) == before
    assert len(queue) == 6


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 6))
def test_shares_are_even(clients: list[str], num_slots: int) -> None:
    """With slots that are given back in order, no caller who still waits runs two less than another one."""
    queue: WaitingQueue[OfCaller] = WaitingQueue()
    for client in clients:
        queue.append(of_caller(client))
    running: Counter[str] = Counter()
    for _ in range(min(num_slots, len(queue))):
        take(queue, running)
        least = min((running[one.ticket.request.client] for one in queue), default=None)
        if least is not None:
            assert max(running.values()) - least <= 1


def test_the_fullest_is_whose_requests_are_most() -> None:
    """Those that gave way once count for nobody; the newest of a caller comes first."""
    queue: WaitingQueue[OfCaller] = WaitingQueue()
    assert queue.fullest() is None
    ones = [of_caller(client) for client in "abbcbc"]
    for one in ones:
        queue.append(one)
    for _ in range(4):
        queue.push_front(of_caller("c"))
    assert queue.fullest() == "b"
    assert [queue.num_of(client) for client in "abcd"] == [1, 3, 2, 0]
    assert list(queue.newest_of("b")) == [ones[4], ones[2], ones[1]]
    assert list(queue.newest_of("d")) == []


def test_newcomers_are_the_first_of_who_runs_nothing() -> None:
    """In the order of turns, one each; those that gave way are none, and are told apart."""
    queue: WaitingQueue[OfCaller] = WaitingQueue()
    ones = [of_caller(client) for client in "abacb"]
    for one in ones:
        queue.append(one)
    assert not queue.has_front
    queue.push_front(of_caller("d"))
    assert queue.has_front
    assert list(queue.newcomers(Counter("a").__getitem__)) == [ones[1], ones[3]]
