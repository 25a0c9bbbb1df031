"""Tests of cuda_spares.py; how the backend uses spares is in test_cuda.py."""

from __future__ import annotations

import pytest

from graphcache.backends.cuda_spares import Executable, Shape, Spares
from tests.graphcache.backends.cuda_fakes import FakeRuntime


def made(runtime: FakeRuntime, *kinds: str) -> tuple[int, Executable]:
    """A graph of a kernel of each kind, and an executable of it."""
    graph = max(runtime.graphs, default=10_000) + 1
    runtime.graphs[graph] = [(kind, lambda: None) for kind in kinds]
    return graph, Executable(runtime.instantiate(graph), Shape.of(graph, runtime), 100)


def test_the_newest_that_fits_is_taken_once() -> None:
    """Of the same shape and accepted by the driver; a refused one stays, and one of other edges is not asked for."""
    runtime = FakeRuntime()
    spares = Spares(runtime, 8)
    graph, first = made(runtime, "x", "y")
    others = [made(runtime, *kinds)[1] for kinds in (("x", "early y"), ("x",), ("x", "z"))]
    second = made(runtime, "x", "y")[1]
    for executable in (first, second, *others):
        spares.add(executable)
    shape = Shape.of(graph, runtime)
    assert [spares.take(graph, shape) for _ in range(3)] == [second, first, None]
    assert spares.all() == tuple(others)


def test_the_oldest_too_many_is_destroyed() -> None:
    """There are never more than so many; with none allowed nothing is kept, and a negative number is refused."""
    runtime = FakeRuntime()
    spares = Spares(runtime, 2)
    executables = [made(runtime, "x")[1] for _ in range(3)]
    for executable in executables:
        spares.add(executable)
    assert spares.all() == tuple(executables[1:])
    assert executables[0].handle not in runtime.executables
    assert spares.clear() == executables[1:]
    assert len(spares) == 0
    none = Spares(runtime, 0)
    none.add(executables[1])
    assert len(none) == 0
    with pytest.raises(ValueError, match="negative"):
        Spares(runtime, -1)
