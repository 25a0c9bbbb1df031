"""Tests of backends/eager.py."""

from __future__ import annotations

import pytest

from graphcache import EagerBackend, GraphStateError, NoTurns


def test_a_replay_runs_the_work() -> None:
    """Capturing runs nothing; every replay runs the work once."""
    runs: list[int] = []
    backend = EagerBackend()
    backend.start(NoTurns())
    captured = backend.capture("a", lambda: runs.append(1))
    assert runs == []
    captured.replay()
    captured.replay()
    assert runs == [1, 1]
    assert captured.size_bytes == 0
    backend.close()


def test_bytes_by_name() -> None:
    """What a graph counts in the ledger can be told by its name."""
    assert EagerBackend(lambda name: len(name)).capture("abc", lambda: None).size_bytes == 3


def test_a_destroyed_capture_does_not_replay() -> None:
    """After destroy the work is dropped and a replay is an error, as it would be on a device."""
    captured = EagerBackend().capture("a", lambda: None)
    captured.destroy()
    with pytest.raises(GraphStateError):
        captured.replay()


def test_it_needs_neither_padding_nor_verification() -> None:
    """An eager replay has no fixed shape and cannot differ from the eager run."""
    assert not EagerBackend.is_fixed_shape
    assert not EagerBackend.needs_verification


def test_warming_up_runs_the_work() -> None:
    """A bind that relies on its warm-up having run may do so here, too."""
    runs: list[int] = []
    EagerBackend().warm_up(lambda: runs.append(1))
    assert runs == [1]
