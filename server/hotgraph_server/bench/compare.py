"""hotgraph against transformers' generate on one machine in one run: what is run, in which order, and the ratio.

`bench/README.md` says precisely what is compared. It knows a way to run prompts on each side, no gRPC, no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hotgraph_server.bench.transformers_process import TimedTokens
from hotgraph_server.bench.workload import WARMUP_STREAM, RandomWorkload, Work

MIN_SEQUENCES = 4  # of one measurement, however few the clients


class Transformers(Protocol):
    """Runs prompts with transformers' generate, one after another or as one padded batch."""

    async def run(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, *, is_batched: bool = False
    ) -> TimedTokens: ...


RunOurs = Callable[[Sequence[Work], int], Awaitable[TimedTokens]]
"""Sends all of some works with so many closed-loop clients; raises ComparisonError when one fails."""


class ComparisonError(Exception):
    """A side failed, so there is nothing to compare."""


@dataclass(slots=True)
class ComparisonLine:
    """One number of clients: tokens/s of both sides, a value a round."""

    num_clients: int
    transformers: list[float] = field(default_factory=list)
    hotgraph: list[float] = field(default_factory=list)
    batched: list[float] = field(default_factory=list)
    num_same: int = 0
    num_sequences: int = 0

    @property
    def ratios(self) -> list[float]:
        """hotgraph over transformers, round by round: both sides of a round ran next to each other."""
        return [ours / theirs for ours, theirs in zip(self.hotgraph, self.transformers, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def transformers_tokens_per_second(self) -> float:
        return statistics.median(self.transformers)

    @property
    def hotgraph_tokens_per_second(self) -> float:
        return statistics.median(self.hotgraph)

    @property
    def batched_tokens_per_second(self) -> float:
        """0 when no batch was run."""
        return statistics.median(self.batched) if self.batched else 0.0

    @property
    def batched_ratio(self) -> float:
        return self.hotgraph_tokens_per_second / self.batched_tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_clients": self.num_clients,
            "transformers_tokens_per_second": self.transformers,
            "hotgraph_tokens_per_second": self.hotgraph,
            "transformers_batched_tokens_per_second": self.batched,
            "ratios": self.ratios,
            "ratio": self.ratio,
            "num_same_sequences": self.num_same,
            "num_sequences": self.num_sequences,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """All lines, by number of clients."""

    lines: tuple[ComparisonLine, ...]

    def missed(self, gates: dict[int, float]) -> list[str]:
        """The gates (clients to least ratio) that were not reached, in words."""
        ratios = {line.num_clients: line.ratio for line in self.lines}
        return [
            f"{clients} clients: {ratios[clients]:.2f}x, needed {least:.2f}x"
            for clients, least in gates.items()
            if ratios[clients] < least
        ]


async def compare(
    transformers: Transformers,
    ours: RunOurs,
    workload: RandomWorkload,
    *,
    clients: Sequence[int],
    num_rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Warms both sides up, then runs `num_rounds` rounds; the side that goes first changes from round to round.

    All works of a measurement ask for as many tokens. Each round has prompts of its own, the same for both sides.
    """
    lines = tuple(ComparisonLine(num_clients) for num_clients in clients)
    index = 0
    for line in lines:
        progress(f"warm-up, {line.num_clients} clients")
        works = [workload.work(number, WARMUP_STREAM) for number in range(line.num_clients)]
        await ours(works, line.num_clients)
        await transformers.run(_prompts(works[:1]), works[0].max_tokens)
    for round_number in range(num_rounds):
        for line in lines:
            count = max(line.num_clients, MIN_SEQUENCES)
            works = [workload.work(index + offset) for offset in range(count)]
            index += count
            progress(f"round {round_number + 1} of {num_rounds}, {line.num_clients} clients")
            await _measure(line, works, transformers, ours, ours_first=bool(round_number % 2))
    return Comparison(lines)


async def _measure(
    line: ComparisonLine, works: Sequence[Work], transformers: Transformers, ours: RunOurs, *, ours_first: bool
) -> None:
    max_tokens = works[0].max_tokens
    mine = await ours(works, line.num_clients) if ours_first else None
    theirs = await transformers.run(_prompts(works), max_tokens)
    if mine is None:
        mine = await ours(works, line.num_clients)
    if line.num_clients > 1:
        batched = await transformers.run(_prompts(works), max_tokens, is_batched=True)
        line.batched.append(batched.tokens_per_second)
    line.transformers.append(theirs.tokens_per_second)
    line.hotgraph.append(mine.tokens_per_second)
    line.num_same += sum(a == b for a, b in zip(mine.token_ids, theirs.token_ids, strict=True))
    line.num_sequences += len(works)


def _prompts(works: Sequence[Work]) -> list[tuple[int, ...]]:
    prompts = []
    for work in works:
        if isinstance(work.prompt, str):
            raise ComparisonError("a comparison is of token ids: both sides must see the same")
        prompts.append(work.prompt)
    return prompts
