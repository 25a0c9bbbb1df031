"""One run of load against a daemon, from connecting to the samples. It prints nothing and writes no file."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hotgraph_client import AsyncClient, Model
from hotgraph_server.bench.arrivals import arrival_times
from hotgraph_server.bench.clock import WallClock
from hotgraph_server.bench.load import Limit, Report, closed_loop, open_loop
from hotgraph_server.bench.sample import Sample
from hotgraph_server.bench.sender import ClientSender, Connection, RequestOptions, connect
from hotgraph_server.bench.workload import WARMUP_STREAM, Lengths, RandomWorkload, TextWorkload, Workload

OPEN_LOOP_CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What a run is. `rate_per_second` makes it an open loop, else `num_clients` are in a closed one."""

    seed: int
    limit: Limit
    prompt_lengths: Lengths
    output_lengths: Lengths
    options: RequestOptions
    num_clients: int = 1
    rate_per_second: float | None = None
    arrivals: str = "poisson"
    gap_seconds: float = 0.0
    prompt_file: Path | None = None
    num_warmup: int = 8

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "prompt_lengths": str(self.prompt_lengths),
            "output_lengths": str(self.output_lengths),
            "prompt_file": None if self.prompt_file is None else str(self.prompt_file),
            "loop": "closed" if self.rate_per_second is None else "open",
        }


@dataclass(frozen=True, slots=True)
class LoadRun:
    """What came of it: the samples, and the model that the daemon said it serves."""

    samples: list[Sample]
    model: Model


def describe_model(model: Model) -> dict[str, Any]:
    """The model as it goes into a run's JSON: what it is and where it runs, without its chat template."""
    return {
        "id": model.id,
        "architecture": model.architecture,
        "runner": model.runner.value,
        "dtype": model.dtype,
        "device": model.device,
        "device_name": model.device_name,
        "num_parameters": model.num_parameters,
        "weights_bytes": model.weights_bytes,
        "context_length": model.context_length,
        "vocabulary_size": model.vocabulary_size,
    }


def make_workload(settings: LoadSettings, model: Model) -> Workload:
    """The run's prompts. Raises ValueError when they do not fit the model, OSError when a file cannot be read."""
    if settings.prompt_file is not None:
        return TextWorkload.read(settings.prompt_file, seed=settings.seed, output_lengths=settings.output_lengths)
    longest = settings.prompt_lengths.maximum + settings.output_lengths.maximum
    if longest > model.context_length:
        raise ValueError(f"prompt and output of {longest} tokens exceed the context of {model.context_length}")
    excluded = frozenset(model.eos_token_ids) | ({model.bos_token_id} if model.bos_token_id is not None else set())
    return RandomWorkload(
        settings.seed, settings.prompt_lengths, settings.output_lengths, model.vocabulary_size, excluded
    )


@contextlib.asynccontextmanager
async def clients_for(connection: Connection, count: int) -> AsyncIterator[list[AsyncClient]]:
    """So many clients, each with a connection of its own, closed on leaving."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connect(connection)) for _ in range(count)]


async def run_load(
    connection: Connection,
    settings: LoadSettings,
    *,
    begin: Callable[[str], None] = lambda _: None,
    report: Report = lambda _: None,
) -> LoadRun:
    """Warms up, then measures. `begin` is told each phase, `report` gets each sample as it ends.

    Warm-up requests are sent by as many clients as the run has (4 in an open loop) and are not among the samples.
    Raises HotgraphError when the daemon cannot be reached or does not tell its model; ValueError and OSError as
    `make_workload`.
    """
    is_open = settings.rate_per_second is not None
    num_connections = OPEN_LOOP_CONNECTIONS if is_open else settings.num_clients
    clock = WallClock()
    try:
        async with clients_for(connection, num_connections) as clients:
            begin("connecting")
            model = await clients[0].get_model()
            workload = make_workload(settings, model)
            sender = ClientSender(clients, settings.options, by_index=is_open)
            if settings.num_warmup:
                begin("warm-up")
                warm_up = Limit(num_requests=settings.num_warmup)
                await closed_loop(
                    sender, workload, clock, warm_up, num_clients=num_connections, stream=WARMUP_STREAM, report=report
                )
            begin("measuring")
            clock.restart()
            if settings.rate_per_second is not None:
                arrivals = arrival_times(settings.rate_per_second, kind=settings.arrivals, seed=settings.seed)
                samples = await open_loop(sender, workload, clock, settings.limit, arrivals, report=report)
            else:
                samples = await closed_loop(
                    sender,
                    workload,
                    clock,
                    settings.limit,
                    num_clients=settings.num_clients,
                    gap_seconds=settings.gap_seconds,
                    report=report,
                )
    finally:
        clock.close()
    return LoadRun(samples, model)
