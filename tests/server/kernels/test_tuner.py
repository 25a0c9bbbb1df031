"""The search for tunings, on a bench without a GPU: it finds the best, keeps the rule where that is, and keeps its time."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import pytest

from graphcache import FakeClock
from hotgraph_server.kernels.few_rows_cuts import ROW_CLASSES, SumTuning, Tuning
from hotgraph_server.kernels.tuner import MARGIN, Tuned, candidates, tune_chain
from hotgraph_server.kernels.tuning import fault
from tests.server.kernels.chains import CHAINS, LLAMA_7B, QWEN_LIKE, SMOLLM2
from tests.server.kernels.fake_bench import BYTES_PER_SECOND, FakeBench, distance

NAMES = ("qkv", "output", "gate_up", "down", "head")


@functools.cache
def wish(rows: int, name: str) -> Tuning:
    """What the fake GPU likes best for a product: neither its rule nor at the end of the list."""
    cuts = candidates(LLAMA_7B.products[name], rows)
    return cuts[3 + (rows + len(name)) % (len(cuts) - 3)]


def liking(rows: int, name: str, cut: Tuning) -> float:
    """A valley: 2 % for each doubling away from the wish."""
    return 0.02 * distance(cut, wish(rows, name))


def found(tuned: Tuned) -> Mapping[tuple[int, str], Tuning]:
    return {(times.rows, times.name): times.tuning for times in tuned.products}


@pytest.mark.parametrize("chain", CHAINS)
def test_candidates(chain: str) -> None:
    """The rule's is first, all can be used, none is there twice, real models have a choice, none changes the trigger."""
    for product in CHAINS[chain].products.values():
        for rows in ROW_CLASSES:
            cuts = candidates(product, rows)
            assert cuts[0] == product.rule(rows)
            assert (1 if chain == "tiny" else 4) <= len(cuts) == len(set(cuts)) <= 64
            assert all(fault(cut, product, rows) is None for cut in cuts)
            assert {cut.triggers_late for cut in cuts} == {cuts[0].triggers_late}
            away = [distance(cut, cuts[0]) for cut in cuts]
            assert away == sorted(away)


@pytest.mark.parametrize("noise", [0.0, 0.0005])
def test_it_finds_what_the_gpu_likes(noise: float) -> None:
    """For each product and row class the cheapest cut, in a table, with its time and the rule's."""
    bench = FakeBench(LLAMA_7B, liking, noise=noise)
    stages: list[str] = []
    tuned = tune_chain(
        bench, [1, 8], seconds=60, clock=bench.clock, report=lambda stage, done, total: stages.append(stage)
    )
    assert [(times.rows, times.name) for times in tuned.products] == [(r, name) for r in (1, 8) for name in NAMES]
    for times in tuned.products:
        # The noise hides what is a small part of a small product.
        assert liking(times.rows, times.name, times.tuning) <= (1e-9 if noise == 0.0 else 0.04)
        assert times.seconds <= times.rule_seconds
        assert times.rule == LLAMA_7B.products[times.name].rule(times.rows)
        shape = LLAMA_7B.products[times.name]
        assert times.bytes_per_second == pytest.approx(BYTES_PER_SECOND, rel=1e-6 if noise == 0.0 else 0.04)
        assert tuned.table.measured[shape, times.rows] == times.tuning
    assert len(tuned.table.measured) == 2 * len(NAMES)
    for chain in tuned.chains:
        assert chain.is_whole
        assert chain.seconds < chain.rule_seconds
        assert chain.num_tried <= chain.num_choices <= chain.num_tried + len(NAMES)
    assert stages[0] == "compiling"
    assert stages[-1].startswith("rows 8: ")


def test_neighbours_count() -> None:
    """A cut that is best alone, and bad beside another one, is not taken: the chain is what is measured."""
    cuts = {name: candidates(SMOLLM2.products[name], 1) for name in NAMES}
    proud, modest = cuts["gate_up"][1], cuts["gate_up"][2]

    class Chain(FakeBench):
        def chain_seconds(self, rows: int, tunings: Mapping[str, Tuning]) -> float:
            clash = 1.2 if tunings["gate_up"] == proud else 1.0
            return super().chain_seconds(rows, tunings) * clash

    def cost(rows: int, name: str, cut: Tuning) -> float:
        return {proud: 0.0, modest: 0.1}.get(cut, 0.3) if name == "gate_up" else 0.0

    bench = Chain(SMOLLM2, cost)
    tuned = tune_chain(bench, [1], seconds=60, clock=bench.clock)
    assert found(tuned)[1, "gate_up"] == modest


def test_a_second_round_sees_what_the_first_changed() -> None:
    """When a later product's cut changes what suits an earlier one, the earlier one is chosen anew."""
    first = candidates(LLAMA_7B.products["qkv"], 1)
    last = candidates(LLAMA_7B.products["head"], 1)

    class Chain(FakeBench):
        def chain_seconds(self, rows: int, tunings: Mapping[str, Tuning]) -> float:
            seconds = super().chain_seconds(rows, tunings)
            if tunings["head"] != last[1]:
                return seconds * (1.0 if tunings["qkv"] == first[1] else 1.1)
            return seconds * (0.7 if tunings["qkv"] == first[2] else 0.8)

    bench = Chain(LLAMA_7B, lambda rows, name, cut: 0.0)
    tuned = tune_chain(bench, [1], seconds=60, clock=bench.clock)
    assert found(tuned)[1, "head"] == last[1]
    assert found(tuned)[1, "qkv"] == first[2]


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_where_nothing_is_better_the_rule_stays(noise: float) -> None:
    """Equal cuts, under a noise that makes now one and now another look best, win nothing that is worth a change."""
    bench = FakeBench(QWEN_LIKE, lambda rows, name, cut: 0.0 if cut == QWEN_LIKE.products[name].rule(rows) else 0.05)
    bench._noise = noise
    tuned = tune_chain(bench, [2], seconds=60, clock=bench.clock)
    chain = tuned.chains[0]
    for times in tuned.products:
        assert times.tuning == times.rule
        assert times.seconds == times.rule_seconds
    assert chain.seconds == chain.rule_seconds
    # That the rule is best was measured, too, and is worth keeping.
    assert len(tuned.table.measured) == len(NAMES)


def test_less_than_the_margin_is_no_gain() -> None:
    """A cut that saves less of the chain than its noise is not taken."""
    product = LLAMA_7B.products["gate_up"]
    total = sum(other.num_bytes for other in LLAMA_7B.products.values())
    best = candidates(product, 1)[2]
    for gain, is_taken in ((0.5 * MARGIN, False), (2 * MARGIN, True)):
        won = gain * total / product.num_bytes
        costs = {("gate_up", best): -won}
        bench = FakeBench(LLAMA_7B, lambda rows, name, cut, costs=costs: costs.get((name, cut), 0.0))  # type: ignore[misc]
        tuned = tune_chain(bench, [1], seconds=60, clock=bench.clock)
        assert (found(tuned)[1, "gate_up"] == best) == is_taken


def test_wrong_results_are_never_taken() -> None:
    """The fastest cut that gives nonsense is told and left aside, and the next best is taken."""
    cuts = candidates(LLAMA_7B.products["down"], 8)
    broken, sound = cuts[4], cuts[5]

    def cost(rows: int, name: str, cut: Tuning) -> float:
        return {broken: 0.0, sound: 0.1}.get(cut, 0.2) if name == "down" else 0.0

    bench = FakeBench(LLAMA_7B, cost, wrong=lambda rows, name, cut: cut == broken)
    tuned = tune_chain(bench, [8], seconds=60, clock=bench.clock)
    assert found(tuned)[8, "down"] == sound
    assert tuned.chains[0].wrong == (("down", broken),)
    # Whatever differs from the rule was checked.
    for times in tuned.products:
        assert times.tuning == times.rule or (8, times.name, times.tuning) in bench.checked


def test_what_the_device_cannot_run_is_not_taken() -> None:
    """A cut whose time is infinite is passed over, and nothing is checked that cannot run."""

    def cost(rows: int, name: str, cut: Tuning) -> float:
        is_large = isinstance(cut, SumTuning) and cut.block_rows == 8
        return math.inf if is_large and cut != LLAMA_7B.products[name].rule(rows) else liking(rows, name, cut)

    bench = FakeBench(LLAMA_7B, cost)
    tuned = tune_chain(bench, [1], seconds=60, clock=bench.clock)
    assert all(math.isfinite(times.seconds) for times in tuned.products)
    assert all(math.isfinite(cost(*checked)) for checked in bench.checked)


def test_it_keeps_its_time() -> None:
    """When compiling or measuring takes long, what differs little from the rule is tried, and the end is near the limit."""
    clock = FakeClock()
    begin = clock.monotonic()
    bench = FakeBench(LLAMA_7B, liking, clock=clock, compile_seconds=0.2)
    tuned = tune_chain(bench, [1, 2, 8], seconds=20, clock=clock)
    assert clock.monotonic() - begin < 24
    assert len(tuned.products) == 3 * len(NAMES)
    for chain in tuned.chains:
        assert not chain.is_whole
        assert 0 < chain.num_tried < chain.num_choices
    for times in tuned.products:
        assert times.seconds <= times.rule_seconds
    # What was not found to be best is not kept as if it had been.
    kept = {(rows, shape) for shape, rows in tuned.table.measured}
    assert kept == {(times.rows, times.shape) for times in tuned.products if times.tuning != times.rule}


@pytest.mark.parametrize("rows", [(1, 2, 8), (8, 2, 1)])
def test_the_time_is_shared_whatever_the_order(rows: tuple[int, ...]) -> None:
    """When there is not enough, and the compilers take long to start, each chain and each product has its part tried."""
    bench = FakeBench(LLAMA_7B, liking, compile_seconds=0.1, start_seconds=10)
    tuned = tune_chain(bench, rows, seconds=40, clock=bench.clock)
    shares = {chain.rows: chain.num_tried / chain.num_choices for chain in tuned.chains}
    assert list(shares) == list(rows)
    assert min(shares.values()) > 0.25
    assert max(shares.values()) < 1.5 * min(shares.values())
    for row in rows:
        for name in NAMES:
            assert sum((row, name) == known for known in bench.measured) > 5


def test_without_time_the_rule_stays() -> None:
    """Even then there is a result, and it changes nothing."""
    bench = FakeBench(LLAMA_7B, liking)
    tuned = tune_chain(bench, [1], seconds=0, clock=bench.clock)
    assert all(times.tuning == times.rule for times in tuned.products)
    assert not tuned.table.measured
    assert not tuned.chains[0].is_whole


def test_time_that_one_class_leaves_is_for_the_next() -> None:
    """A class that is done early, for want of candidates, does not use up its share."""
    clock = FakeClock()
    bench = FakeBench(SMOLLM2, liking_of_smollm2, clock=clock, compile_seconds=0.05)
    tuned = tune_chain(bench, [1, 8], seconds=30, clock=clock)
    assert all(chain.is_whole for chain in tuned.chains)


def liking_of_smollm2(rows: int, name: str, cut: Tuning) -> float:
    return 0.02 * distance(cut, candidates(SMOLLM2.products[name], rows)[-1])
