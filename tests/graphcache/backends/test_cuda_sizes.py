"""Tests of backends/cuda_sizes.py."""

from __future__ import annotations

import random

import pytest

from graphcache.backends.cuda_sizes import ASSUMED_NODE_BYTES, MAX_NODE_BYTES, STEP_BYTES, ExecutableSizes


def test_small_executables_count_their_mean() -> None:
    """When memory moves in large steps, once in several instantiates, each counts about its true share before long."""
    chance = random.Random(2)
    sizes = ExecutableSizes()
    taken, given, counted, actual = 0.0, 0, 0, 0.0
    for number in range(400):
        num_nodes = chance.randint(100, 300)
        taken += num_nodes * 2600.0
        fallen_bytes = 0
        while given < taken:
            given += STEP_BYTES
            fallen_bytes += STEP_BYTES
        size_bytes = sizes.measured(num_nodes, fallen_bytes)
        if number >= 100:
            counted += size_bytes
            actual += num_nodes * 2600.0
    assert counted == pytest.approx(actual, rel=0.1)


def test_large_falls_are_believed() -> None:
    """An executable of many steps counts what memory fell by."""
    assert ExecutableSizes().measured(400, 20 * STEP_BYTES) == 20 * STEP_BYTES


def test_what_others_did_is_not_believed() -> None:
    """Memory that rose, or fell by more than nodes can take, changes nothing in what is known."""
    sizes = ExecutableSizes()
    sizes.measured(1000, 3 * STEP_BYTES)
    before = sizes.node_bytes
    assert sizes.measured(100, -STEP_BYTES) == round(100 * before)
    assert sizes.measured(100, 101 * MAX_NODE_BYTES + STEP_BYTES) == round(100 * before)
    assert sizes.node_bytes == before


def test_before_anything_is_known_an_assumption_counts() -> None:
    """The first executable, too, counts something."""
    assert ExecutableSizes().measured(10, -1) == 10 * ASSUMED_NODE_BYTES
