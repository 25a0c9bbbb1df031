"""Tests of events.py."""

from __future__ import annotations

import logging
import threading

import pytest

from graphcache import Event, EventsGoneError, EventType, FakeClock
from graphcache.events import EventLog


def make_log(max_events: int = 4) -> EventLog[str]:
    return EventLog(FakeClock(), max_events)


def sequences(events: list[Event[str]]) -> list[int]:
    return [event.sequence for event in events]


def test_sequences_grow_by_one_from_one() -> None:
    """Events are numbered from 1 without gaps and carry the clock's time."""
    log = make_log()
    for _ in range(3):
        log.append(EventType.BUDGET_UPDATED, detail="x")
    assert sequences(log.after(0)) == [1, 2, 3]
    assert log.last_sequence == 3
    assert log.after(0)[0].time == FakeClock().time()


def test_resuming_gives_what_came_after() -> None:
    """after(n) has exactly the events past n, and nothing past the last."""
    log = make_log()
    for _ in range(3):
        log.append(EventType.STATISTICS)
    assert sequences(log.after(1)) == [2, 3]
    assert log.after(3) == []


def test_events_too_old_are_gone() -> None:
    """Resuming where an event was dropped raises; 0 gives all that is left; the oldest resumable place works."""
    log = make_log(max_events=4)
    for _ in range(10):
        log.append(EventType.STATISTICS)
    assert sequences(log.after(0)) == [7, 8, 9, 10]
    assert sequences(log.after(6)) == [7, 8, 9, 10]
    with pytest.raises(EventsGoneError) as gone:
        log.after(5)
    assert (gone.value.oldest_sequence, gone.value.last_sequence) == (7, 10)


@pytest.mark.parametrize("sequence", [-1, 1])
def test_events_of_another_life_are_gone(sequence: int) -> None:
    """A place that this log never had is refused, so that the caller starts again from a listing."""
    with pytest.raises(EventsGoneError):
        make_log().after(sequence)


def test_an_empty_log_has_nothing() -> None:
    """Nothing happened yet: nothing is given, nothing is gone."""
    assert make_log().after(0) == []


def test_listeners_hear_each_event_once_and_in_order() -> None:
    """Everyone hears everything once, in order, until removed; removing twice is no error."""
    log = make_log()
    first: list[int] = []
    second: list[int] = []
    log.add_listener(lambda event: first.append(event.sequence))

    def listener(event: Event[str]) -> None:
        second.append(event.sequence)

    log.add_listener(listener)
    log.append(EventType.STATISTICS)
    log.append(EventType.STATISTICS)
    log.deliver()
    log.deliver()
    log.remove_listener(listener)
    log.remove_listener(listener)
    log.append(EventType.STATISTICS)
    log.deliver()
    assert first == [1, 2, 3]
    assert second == [1, 2]


def test_a_failing_listener_is_logged_and_others_still_hear(caplog: pytest.LogCaptureFixture) -> None:
    """A listener that raises stops neither the others nor its own later events."""
    log = make_log()
    heard: list[int] = []

    def fail(event: Event[str]) -> None:
        heard.append(-event.sequence)
        raise RuntimeError("broken listener")

    log.add_listener(fail)
    log.add_listener(lambda event: heard.append(event.sequence))
    with caplog.at_level(logging.ERROR, logger="graphcache"):
        for _ in range(2):
            log.append(EventType.STATISTICS)
            log.deliver()
    assert heard == [-1, 1, -2, 2]
    assert "broken listener" in caplog.text


def test_a_listener_may_make_events() -> None:
    """Events made by a listener come after those that are being told, for every listener."""
    log = make_log()
    heard: list[tuple[str, int]] = []

    def echo(event: Event[str]) -> None:
        heard.append(("echo", event.sequence))
        if event.sequence == 1:
            log.append(EventType.STATISTICS)
            log.deliver()

    log.add_listener(echo)
    log.add_listener(lambda event: heard.append(("other", event.sequence)))
    log.append(EventType.STATISTICS)
    log.deliver()
    assert heard == [("echo", 1), ("other", 1), ("echo", 2), ("other", 2)]


def test_order_holds_across_threads() -> None:
    """With several threads making events, every listener still hears them in the order of their sequence."""
    log = make_log(max_events=100_000)
    lock = threading.Lock()
    heard: list[int] = []
    log.add_listener(lambda event: heard.append(event.sequence))

    def make_events() -> None:
        for _ in range(500):
            with lock:
                log.append(EventType.STATISTICS)
            log.deliver()

    threads = [threading.Thread(target=make_events) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert heard == list(range(1, 2001))
