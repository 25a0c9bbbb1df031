"""A comparison against a daemon that runs already: the other side's process, the rounds, what both sides told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotgraph_client import AsyncClient
from hotgraph_server.bench.clock import WallClock
from hotgraph_server.bench.compare import Comparison, ComparisonError, compare
from hotgraph_server.bench.load import Limit, closed_loop
from hotgraph_server.bench.run import clients_for, describe_model
from hotgraph_server.bench.sender import ClientSender, Connection, RequestOptions
from hotgraph_server.bench.transformers_process import TimedTokens, transformers_process
from hotgraph_server.bench.workload import Lengths, RandomWorkload, Work


@dataclass(frozen=True, slots=True)
class ComparisonSettings:
    """What is compared: a folder that transformers can load, the lengths in tokens, and on how many CPU threads."""

    folder: Path
    num_threads: int
    seed: int
    clients: tuple[int, ...] = (1, 8)
    num_rounds: int = 3
    num_prompt_tokens: int = 128
    num_output_tokens: int = 64

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.folder.name,  # not where it lies: results travel
            "num_threads": self.num_threads,
            "seed": self.seed,
            "clients": list(self.clients),
            "num_rounds": self.num_rounds,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "dtype": "float32",
            "prefix_caching": False,
        }


@dataclass(frozen=True, slots=True)
class ComparisonRun:
    """The comparison, and what each side told of itself."""

    comparison: Comparison
    transformers: dict[str, Any]
    model: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Fixed:
    """Works that are made already, one after the other."""

    works: Sequence[Work]

    def work(self, index: int, stream: int = 0) -> Work:
        return self.works[index]


async def run_comparison(
    target: str, settings: ComparisonSettings, *, progress: Callable[[str], None] = lambda _: None
) -> ComparisonRun:
    """Starts transformers, runs all rounds against it and the daemon at `target`, and stops transformers.

    Raises ChildError, ComparisonError, HotgraphError.
    """
    async with contextlib.AsyncExitStack() as stack:
        clients = await stack.enter_async_context(clients_for(Connection(target), max(settings.clients)))
        model = await clients[0].get_model()
        if model.dtype != "float32" or model.device != "cpu":
            raise ComparisonError(
                f"transformers runs in float32 on the CPU, the daemon in {model.dtype} on {model.device}"
            )
        progress("starting transformers")
        theirs = stack.enter_context(transformers_process(settings.folder, settings.num_threads))
        prompt_lengths, output_lengths = Lengths((settings.num_prompt_tokens,)), Lengths((settings.num_output_tokens,))
        excluded = frozenset(model.eos_token_ids)
        workload = RandomWorkload(settings.seed, prompt_lengths, output_lengths, model.vocabulary_size, excluded)
        ours = _Ours(clients)
        comparison = await compare(
            theirs, ours, workload, clients=settings.clients, num_rounds=settings.num_rounds, progress=progress
        )
        return ComparisonRun(comparison, theirs.facts, describe_model(model))


class _Ours:
    """The daemon's side: so many clients in a closed loop, each with its own connection."""

    def __init__(self, clients: Sequence[AsyncClient]) -> None:
        self._sender = ClientSender(clients, RequestOptions(keeps_tokens=True))

    async def __call__(self, works: Sequence[Work], num_clients: int) -> TimedTokens:
        clock = WallClock()
        try:
            samples = await closed_loop(
                self._sender, _Fixed(works), clock, Limit(num_requests=len(works)), num_clients=num_clients
            )
        finally:
            clock.close()
        for sample in samples:
            if not sample.is_ok:
                raise ComparisonError(f"a request to the daemon failed: {sample.error}: {sample.error_message}")
        return TimedTokens(max(sample.end for sample in samples), [sample.token_ids for sample in samples])
