"""Tests of scheduler/slots.py."""

from __future__ import annotations

from hotgraph_server.scheduler.slots import SlotPool


def test_the_lowest_free_slot_is_taken() -> None:
    """Slots stay dense: a slot given back is taken again before a higher one."""
    pool = SlotPool(3)
    assert [pool.take(), pool.take()] == [0, 1]
    pool.give_back(0)
    assert (pool.num_free, pool.num_used) == (2, 1)
    assert [pool.take(), pool.take()] == [0, 2]
    assert pool.num_free == 0
