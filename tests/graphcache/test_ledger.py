"""Tests of ledger.py."""

from __future__ import annotations

import pytest

from graphcache.ledger import Ledger


def test_bytes_move_from_used_to_retiring_to_gone() -> None:
    """A graph's bytes are used while it serves, retiring until it is destroyed, and then nowhere."""
    ledger = Ledger(100)
    ledger.publish(60)
    assert (ledger.used_bytes, ledger.retiring_bytes, ledger.num_graphs) == (60, 0, 1)
    ledger.retire(60)
    assert (ledger.used_bytes, ledger.retiring_bytes, ledger.num_graphs) == (0, 60, 0)
    ledger.free(60)
    assert ledger.retiring_bytes == 0


def test_kv_blocks_take_from_the_total() -> None:
    """With a total, what KV blocks hold is not there for graphs; the limit for graphs holds besides."""
    ledger = Ledger(100, total_bytes=150)
    assert ledger.graph_limit_bytes == 100
    ledger.kv_cache_bytes = 80
    assert ledger.graph_limit_bytes == 70
    ledger.kv_cache_bytes = 200
    assert ledger.graph_limit_bytes == 0


def test_without_a_total_kv_blocks_are_only_shown() -> None:
    """Without a total the graphs' limit is the limit."""
    ledger = Ledger(100)
    ledger.kv_cache_bytes = 10**12
    assert ledger.graph_limit_bytes == 100


def test_over_limit() -> None:
    """The ledger says when the graphs hold more than they may."""
    ledger = Ledger(100)
    ledger.publish(100)
    assert not ledger.is_over_limit
    ledger.limit_bytes = 99
    assert ledger.is_over_limit


def test_our_own_mistakes_are_caught() -> None:
    """Freeing, retiring or unpinning more than there is fails at once."""
    with pytest.raises(AssertionError):
        Ledger(100).free(1)
    with pytest.raises(AssertionError):
        Ledger(100).retire(1)
    with pytest.raises(AssertionError):
        Ledger(100).pin(1)
    ledger = Ledger(100)
    ledger.publish(10)
    ledger.pin(10)
    with pytest.raises(AssertionError):
        ledger.unpin(11)
