"""Finds how to cut products of few rows up: tries one product's cuts at a time in the whole chain, and keeps what is faster.

It knows no GPU: what measures, compiles and checks is a `Bench` (`tuner_gpu.py` has the real one), which tests replace. Kernels
of a chain overlap, so a cut that is best alone may be worse between its neighbours: the chain decides.

The time is shared out evenly: what is compiled is the same part of every chain, and each chain, and each product of it, has the
same time to be measured in, or more where others need less.

Every verdict is by two rounds: a quick one over all cuts, and one that measures the few best again, in turn with what they
would replace, so that a GPU that gets slower meanwhile does so for all of them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Protocol

from hotgraph_server.kernels.few_rows_cuts import MAX_SUM_ROWS, DotTuning, SumTuning, Tuning
from hotgraph_server.kernels.jit import next_power_of_two
from hotgraph_server.kernels.tuning import ChainShape, ProductShape, TuningTable, fault, table_of

MARGIN = 0.001
"""Of the chain's time: what a cut must win to be taken. Less than that is noise."""

NUM_FINALISTS = 3
NUM_READINGS = 5  # of each finalist
NUM_LAST_READINGS = 9  # of what was found and of the rule, in turn
NUM_ROUNDS = 2
_COMPILE_SHARE = 0.6  # of the time that may go by before measuring begins

Choices = Mapping[str, Sequence[Tuning]]
"""Of each product of the chain, what may be tried; the first one is the rule's."""

Report = Callable[[str, int, int], None]
"""Told of a stage, and how much of how many of it is done."""


class Clock(Protocol):
    """A clock whose differences are seconds."""

    def monotonic(self) -> float: ...


class Bench(Protocol):
    """A chain of products on some device. `rows` is a row class."""

    @property
    def shape(self) -> ChainShape: ...

    def compiled(self, choices: Mapping[int, Choices], until: float, report: Report) -> Mapping[int, Choices]:
        """Of the choices of each row class those compiled at the time `until`, in order, and always each product's first.

        All classes get on alike, from what stands first for them to what stands last.
        """
        ...

    def chain_seconds(self, rows: int, tunings: Mapping[str, Tuning]) -> float:
        """Of the whole chain once; infinite when the device cannot run it so."""
        ...

    def product_seconds(self, rows: int, name: str, tuning: Tuning) -> float:
        """Of one product in a chain of its own kind."""
        ...

    def agrees(self, rows: int, name: str, tuning: Tuning) -> bool:
        """Whether a product gives what its definition gives, on fresh random inputs."""
        ...


@dataclass(frozen=True, slots=True)
class ProductTimes:
    """One product at one row class, alone: by the rule, and as found."""

    name: str
    rows: int
    shape: ProductShape
    rule: Tuning
    tuning: Tuning
    rule_seconds: float
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Of the weight, as found."""
        return self.shape.num_bytes / self.seconds


@dataclass(frozen=True, slots=True)
class ChainTimes:
    """The whole chain at one row class. is_whole: everything was tried; wrong: what was fast, and not right."""

    rows: int
    rule_seconds: float
    seconds: float
    num_tried: int
    num_choices: int
    is_whole: bool
    wrong: tuple[tuple[str, Tuning], ...]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a tuning run found."""

    table: TuningTable
    products: tuple[ProductTimes, ...]
    chains: tuple[ChainTimes, ...]


def candidates(shape: ProductShape, rows: int) -> list[Tuning]:
    """What is tried for a product: the rule's first, then what differs least from it. All of them can be used."""
    rule = shape.rule(rows)
    tries = _sums(shape.num_inputs) if rows <= MAX_SUM_ROWS else _dots(shape.num_inputs)
    timed = [replace(cut, triggers_late=rule.triggers_late) for cut in tries]
    sound = {cut for cut in timed if cut != rule and fault(cut, shape, rows) is None}
    return [rule, *sorted(sound, key=lambda cut: (_distance(cut, rule), astuple(cut)))]


def tune_chain(
    bench: Bench, rows: Sequence[int], *, seconds: float, clock: Clock, report: Report = lambda stage, done, total: None
) -> Tuned:
    """Tunes all products of a chain for some row classes, within about so many seconds for all of them.

    Whatever the time, no product gets a cut that was not measured to be faster in the chain and checked to be right.
    """
    begin = clock.monotonic()
    choices = {
        row: {name: candidates(shape, row) for name, shape in bench.shape.products.items()}
        for row in dict.fromkeys(rows)
    }
    compiled = bench.compiled(choices, begin + seconds * _COMPILE_SHARE, report)
    products, chains = [], []
    for index, row in enumerate(rows):
        end = _share_end(clock, begin + seconds, len(rows) - index)
        search = _Search(bench, row, compiled[row], end, clock, report)
        found = search.run()
        products += [_product_times(bench, row, name, cut) for name, cut in found.items()]
        chains.append(search.times(sum(map(len, choices[row].values()))))
    # Where the time did not suffice, the rule was not found to be the best, and must not replace what was.
    whole = {chain.rows for chain in chains if chain.is_whole}
    measured = [
        (times.shape, times.rows, times.tuning)
        for times in products
        if times.tuning != times.rule or times.rows in whole
    ]
    return Tuned(table_of(measured, "hotgraph tune"), tuple(products), tuple(chains))


def _share_end(clock: Clock, end: float, num_left: int) -> float:
    """When the first of so many has to be done, so that all have as much of the time until `end`."""
    now = clock.monotonic()
    return now + max(end - now, 0.0) / num_left


def _product_times(bench: Bench, rows: int, name: str, tuning: Tuning) -> ProductTimes:
    shape = bench.shape.products[name]
    rule = shape.rule(rows)
    seconds = bench.product_seconds(rows, name, tuning)
    rule_seconds = seconds if tuning == rule else bench.product_seconds(rows, name, rule)
    return ProductTimes(name, rows, shape, rule, tuning, rule_seconds, seconds)


class _Search:
    """Coordinate descent for one row class."""

    def __init__(self, bench: Bench, rows: int, choices: Choices, end: float, clock: Clock, report: Report) -> None:
        self._bench = bench
        self._rows = rows
        self._choices = {name: list(cuts) for name, cuts in choices.items()}
        self._end = end
        self._clock = clock
        self._report = report
        self._rule = {name: cuts[0] for name, cuts in choices.items()}
        self._best = dict(self._rule)
        self._tried: set[tuple[str, Tuning]] = set()
        self._wrong: list[tuple[str, Tuning]] = []
        self._is_whole = True
        self._rule_seconds = self._seconds = math.nan

    def run(self) -> Mapping[str, Tuning]:
        """The cuts found; the rule's, all of them, when those together are not faster."""
        for _ in range(NUM_ROUNDS):
            before = dict(self._best)
            for index, name in enumerate(self._choices):
                self._sweep(name, _share_end(self._clock, self._end, len(self._choices) - index))
            if self._best == before or not self._is_whole:
                break
        self._compare_with_rule()
        return dict(self._best)

    def times(self, num_choices: int) -> ChainTimes:
        """Of the run."""
        return ChainTimes(
            rows=self._rows,
            rule_seconds=self._rule_seconds,
            seconds=self._seconds,
            num_tried=len(self._tried),
            num_choices=num_choices,
            is_whole=self._is_whole and len(self._tried) >= num_choices - len(self._choices),
            wrong=tuple(self._wrong),
        )

    def _sweep(self, name: str, end: float) -> None:
        """Takes the best cut of one product, the others as they are, and leaves the few best for the next round."""
        own = self._best[name]
        found: dict[Tuning, float] = {}
        cuts = [cut for cut in self._choices[name] if cut != own]
        for index, cut in enumerate(cuts):
            if self._clock.monotonic() >= end:
                self._is_whole = False
                break
            found[cut] = self._measure({**self._best, name: cut})
            self._tried.add((name, cut))
            self._report(f"rows {self._rows}: {name}", index + 1, len(cuts))
        finalists = sorted((cut for cut in found if math.isfinite(found[cut])), key=found.__getitem__)[:NUM_FINALISTS]
        seconds = self._in_turn([{**self._best, name: cut} for cut in (own, *finalists)], NUM_READINGS)
        limit = seconds[0] * (1 - MARGIN)
        kept = list(finalists)
        for cut, time in sorted(zip(finalists, seconds[1:], strict=True), key=lambda pair: pair[1]):
            if time >= limit:
                break
            if self._bench.agrees(self._rows, name, cut):
                self._best[name] = cut
                break
            self._wrong.append((name, cut))
            kept.remove(cut)
        self._choices[name] = [own, *kept]

    def _compare_with_rule(self) -> None:
        if self._best == self._rule:
            self._rule_seconds = self._seconds = self._in_turn([self._rule], NUM_LAST_READINGS)[0]
            return
        self._rule_seconds, self._seconds = self._in_turn([self._rule, self._best], NUM_LAST_READINGS)
        if self._seconds >= self._rule_seconds * (1 - MARGIN):
            self._best, self._seconds = dict(self._rule), self._rule_seconds

    def _in_turn(self, all_tunings: Sequence[Mapping[str, Tuning]], num_readings: int) -> list[float]:
        """Medians of readings that are taken one of each after the other."""
        readings = [[self._measure(tunings) for tunings in all_tunings] for _ in range(num_readings)]
        return [statistics.median(column) for column in zip(*readings, strict=True)]

    def _measure(self, tunings: Mapping[str, Tuning]) -> float:
        return self._bench.chain_seconds(self._rows, tunings)


def _sums(num_inputs: int) -> list[Tuning]:
    largest = min(max(next_power_of_two(num_inputs), 256), 4096)
    tries: list[Tuning] = []
    for tile, block_rows, ahead in itertools.product((largest, largest // 2), (2, 4, 8), (1, 2, 3)):
        for num_warps in (4, 8) if tile >= 1024 else (max(tile // 256, 1),):
            num_bytes = 2 * block_rows * min(tile * ahead, num_inputs) // (32 * num_warps)
            # Fewer bytes in flight a thread leave the memory idle; more leave the thread no registers.
            if (ahead - 1) * tile < num_inputs and 32 <= num_bytes <= 512:
                tries.append(SumTuning(block_rows, tile, num_warps, ahead))
    return tries


def _dots(num_inputs: int) -> list[Tuning]:
    tries: list[Tuning] = []
    for (block_rows, parts, most), num_warps in itertools.product(
        ((16, 1, 8), (16, 2, 4), (16, 2, 6), (16, 4, 2), (16, 4, 3), (32, 1, 4), (32, 1, 6), (32, 2, 3)), (2, 4, 8)
    ):
        ahead = min(most, -(-num_inputs // (32 * parts * num_warps)))
        tries.append(DotTuning(block_rows, parts, num_warps, ahead, tokens_ahead=min(2, ahead)))
    return tries


def _distance(cut: Tuning, other: Tuning) -> float:
    """By how many doublings two cuts differ."""
    pairs = zip(astuple(cut)[:-1], astuple(other)[:-1], strict=True)
    return sum(abs(math.log2(one / two)) for one, two in pairs)
