"""Tests of bench/compare.py, with both sides scripted."""

import asyncio
from collections.abc import Sequence

import pytest

from hotgraph_server.bench.compare import MIN_SEQUENCES, ComparisonError, compare
from hotgraph_server.bench.transformers_process import TimedTokens
from hotgraph_server.bench.workload import Lengths, RandomWorkload, Work

WORKLOAD = RandomWorkload(1, Lengths((6,)), Lengths((4,)), 100)


class Sides:
    """Both sides: each takes the seconds it is told and remembers who was asked what, in order."""

    def __init__(self, theirs_seconds: float = 2.0, ours_seconds: float = 1.0) -> None:
        self.theirs_seconds = theirs_seconds
        self.ours_seconds = ours_seconds
        self.calls: list[tuple[str, int, tuple[tuple[int, ...], ...]]] = []

    def _answer(self, prompts: Sequence[Sequence[int]], seconds: float) -> TimedTokens:
        return TimedTokens(seconds, [[sum(prompt) % 7] * 4 for prompt in prompts])

    async def run(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, is_batched: bool = False) -> TimedTokens:
        assert max_tokens == 4
        self.calls.append(("batched" if is_batched else "theirs", 1, tuple(map(tuple, prompts))))
        return self._answer(prompts, self.theirs_seconds / (4 if is_batched else 1))

    async def ours(self, works: Sequence[Work], num_clients: int) -> TimedTokens:
        prompts = [work.prompt for work in works if not isinstance(work.prompt, str)]
        self.calls.append(("ours", num_clients, tuple(prompts)))
        return self._answer(prompts, self.ours_seconds)


def test_ratios_and_order() -> None:
    """Both sides get the same prompts, each round new ones, and take turns in going first; ratios are of tokens/s."""
    sides = Sides()
    result = asyncio.run(compare(sides, sides.ours, WORKLOAD, clients=(1, 8), num_rounds=2))
    one, eight = result.lines
    assert one.ratios == eight.ratios == [2.0, 2.0]
    assert one.hotgraph == [4 * MIN_SEQUENCES / 1.0] * 2
    assert eight.transformers == [4 * 8 / 2.0] * 2
    assert one.batched == []
    assert eight.batched == [4 * 8 / 0.5] * 2
    assert eight.batched_ratio == 0.5
    assert (eight.num_same, eight.num_sequences) == (16, 16)

    measured = sides.calls[4:]  # the first four are the warm-up of both numbers of clients
    names = [name for name, _, _ in measured]
    assert names == ["theirs", "ours", "theirs", "ours", "batched", "ours", "theirs", "ours", "theirs", "batched"]
    assert measured[0][2] == measured[1][2]
    assert measured[2][2] == measured[3][2] == measured[4][2]
    seen = [prompt for name, _, prompts in sides.calls if name == "ours" for prompt in prompts]
    assert len(set(seen[1:])) == len(seen[1:])  # the first is warm-up prompt 0, which both numbers of clients share


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    """One disturbed round does not move the result."""
    sides = Sides()
    seconds = iter([1.0, 1.0, 1.0, 40.0, 1.0])  # the warm-up, then the rounds

    async def ours(works: Sequence[Work], num_clients: int) -> TimedTokens:
        sides.ours_seconds = next(seconds)
        return await sides.ours(works, num_clients)

    (line,) = asyncio.run(compare(sides, ours, WORKLOAD, clients=(1,), num_rounds=4)).lines
    assert line.ratios == [2.0, 2.0, 2.0 / 40, 2.0]
    assert line.ratio == 2.0


def test_gates() -> None:
    """A ratio below its gate is told with both numbers; one at its gate is not."""
    result = asyncio.run(compare(sides := Sides(), sides.ours, WORKLOAD, clients=(1, 8), num_rounds=1))
    assert result.missed({1: 2.0, 8: 2.0}) == []
    assert result.missed({1: 1.0, 8: 2.5}) == ["8 clients: 2.00x, needed 2.50x"]


def test_different_tokens_are_counted() -> None:
    """Sequences on which the sides differ show in the count of the same ones."""
    sides = Sides()

    async def ours(works: Sequence[Work], num_clients: int) -> TimedTokens:
        answer = await sides.ours(works, num_clients)
        answer.token_ids[0] = [99, 99, 99, 99]
        return answer

    (line,) = asyncio.run(compare(sides, ours, WORKLOAD, clients=(1,), num_rounds=1)).lines
    assert (line.num_same, line.num_sequences) == (MIN_SEQUENCES - 1, MIN_SEQUENCES)


def test_a_failure_ends_the_comparison() -> None:
    """When a side fails there is no result."""

    async def ours(works: Sequence[Work], num_clients: int) -> TimedTokens:
        raise ComparisonError("a request failed")

    with pytest.raises(ComparisonError, match="a request failed"):
        asyncio.run(compare(Sides(), ours, WORKLOAD, clients=(1,), num_rounds=1))
