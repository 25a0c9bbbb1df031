"""Tests of scheduler/yielding.py."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.scheduler.yielding import who_yields
from tests.server.scheduler.callers import OfCaller, of_caller


def running(clients: str) -> list[OfCaller]:
    return [of_caller(client) for client in clients]


def test_the_newest_of_who_has_most_yields_first() -> None:
    """One after another of whoever keeps most then, the newest of each first."""
    all_of_them = running("aabbbab")  # four of b
    leaving = who_yields(all_of_them, 4)
    assert [all_of_them.index(one) for one in leaving] == [6, 5, 4, 1]


@given(st.text("abcd", max_size=20), st.integers(-3, 25))
def test_nobody_loses_the_last_one(clients: str, num_wanted: int) -> None:
    """As many yield as are wanted, as long as some caller has two; of nobody the one that came first."""
    all_of_them = running(clients)
    leaving = who_yields(all_of_them, num_wanted)
    kept = Counter(one.ticket.request.client for one in all_of_them if one not in leaving)
    assert len(leaving) == min(max(num_wanted, 0), len(clients) - len(set(clients)))
    assert set(kept) == set(clients)
    firsts = {clients.index(client) for client in set(clients)}
    assert not firsts & {all_of_them.index(one) for one in leaving}
