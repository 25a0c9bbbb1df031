"""A bench without a GPU: how long a cut takes follows from its numbers, and time passes on a fake clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import astuple

from graphcache import FakeClock
from hotgraph_server.kernels.few_rows_cuts import Tuning
from hotgraph_server.kernels.tuner import Choices, Report
from hotgraph_server.kernels.tuning import ChainShape

BYTES_PER_SECOND = 4e12

Cost = Callable[[int, str, Tuning], float]
"""Of a row class, a product and its cut: seconds over those that the weight's bytes take."""


def distance(cut: Tuning, other: Tuning) -> float:
    """How far two cuts are from each other, in doublings."""
    return sum(abs(math.log2(one / two)) for one, two in zip(astuple(cut)[:-1], astuple(other)[:-1], strict=True))


class FakeBench:
    """A `tuner.Bench`. cost: what a cut adds; wrong: what gives nonsense.

    It compiles a cut of a product in compile_seconds, and nothing before start_seconds.
    """

    def __init__(
        self,
        shape: ChainShape,
        cost: Cost,
        *,
        clock: FakeClock | None = None,
        compile_seconds: float = 0.0,
        start_seconds: float = 0.0,
        noise: float = 0.0,
        wrong: Callable[[int, str, Tuning], bool] = lambda rows, name, cut: False,
    ) -> None:
        self.shape = shape
        self.clock = clock or FakeClock()
        self.num_measured = 0
        self.measured: list[tuple[int, str]] = []  # of each reading, what was not cut as by the rule
        self.checked: list[tuple[int, str, Tuning]] = []
        self._cost = cost
        self._compile_seconds = compile_seconds
        self._start_seconds = start_seconds
        self._noise = noise
        self._wrong = wrong
        self._random = random.Random(7)
        self._compiled: set[tuple[int, str, Tuning]] = set()

    def __enter__(self) -> FakeBench:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def compiled(self, choices: Mapping[int, Choices], until: float, report: Report) -> Mapping[int, Choices]:
        kept: dict[int, dict[str, list[Tuning]]] = {rows: {name: [] for name in choices[rows]} for rows in choices}
        self.clock.advance(self._start_seconds)
        for index in range(64):
            for rows, of_rows in choices.items():
                for name, cuts in of_rows.items():
                    if index >= len(cuts) or (index and self.clock.monotonic() >= until):
                        continue
                    self.clock.advance(self._compile_seconds)
                    kept[rows][name].append(cuts[index])
                    self._compiled.add((rows, name, cuts[index]))
        report("compiling", 1, 1)
        return kept

    def chain_seconds(self, rows: int, tunings: Mapping[str, Tuning]) -> float:
        assert all((rows, name, cut) in self._compiled for name, cut in tunings.items()), (
            "measured before it is compiled"
        )
        self.num_measured += 1
        self.measured += [(rows, name) for name in tunings if tunings[name] != self.shape.products[name].rule(rows)]
        self.clock.advance(0.01)
        seconds = sum(self._product(rows, name, cut) for name, cut in tunings.items())
        return seconds * (1 + self._noise * self._random.uniform(-1, 1))

    def product_seconds(self, rows: int, name: str, tuning: Tuning) -> float:
        return self._product(rows, name, tuning)

    def agrees(self, rows: int, name: str, tuning: Tuning) -> bool:
        self.checked.append((rows, name, tuning))
        return not self._wrong(rows, name, tuning)

    def _product(self, rows: int, name: str, cut: Tuning) -> float:
        return self.shape.products[name].num_bytes / BYTES_PER_SECOND * (1 + self._cost(rows, name, cut))
