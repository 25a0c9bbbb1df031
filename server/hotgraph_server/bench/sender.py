"""Sends requests through gRPC with the Python client, and notes when each token came. It retries and resumes nothing.

It knows the client's API and no protobuf.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from hotgraph_client import AsyncClient, Finished, TlsConfig, Tokens
from hotgraph_client.errors import HotgraphError
from hotgraph_server.bench.clock import Clock
from hotgraph_server.bench.sample import STREAM_LOST, WRONG_LENGTH, Sample, ServerView
from hotgraph_server.bench.workload import Work


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the daemon is, and how to be let in."""

    target: str
    token: str | None = None
    tls: bool | TlsConfig | None = None


def connect(connection: Connection) -> AsyncClient:
    """A client whose connection is its own: without the local pool, gRPC lets channels to one target share one."""
    return AsyncClient(
        connection.target,
        token=connection.token,
        tls=connection.tls,
        max_attempts=1,
        resume=False,
        options=(("grpc.use_local_subchannel_pool", 1),),
    )


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What all requests of a run ask alike."""

    temperature: float = 0.0
    ignore_eos: bool = True
    graph_policy: str = "prefer"
    timeout_seconds: float | None = None
    keeps_tokens: bool = False


class ClientSender:
    """Sends over a fixed set of clients: sample.client modulo their number in a closed loop, the index's in an open one."""

    def __init__(self, clients: Sequence[AsyncClient], options: RequestOptions, *, by_index: bool = False) -> None:
        self._clients = clients
        self._options = options
        self._by_index = by_index

    async def send(self, work: Work, sample: Sample, clock: Clock) -> None:
        """See `load.Sender`."""
        turn = sample.index if self._by_index else sample.client
        client = self._clients[turn % len(self._clients)]
        sample.sent = clock.now()
        try:
            await self._generate(client, work, sample, clock)
        except HotgraphError as error:
            sample.fail(error.reason or error.code.name, str(error))
        except asyncio.CancelledError:
            sample.fail("CANCELLED", "the run was ended")
            raise
        finally:
            sample.end = clock.now()

    async def _generate(self, client: AsyncClient, work: Work, sample: Sample, clock: Clock) -> None:
        options = self._options
        finished: Finished | None = None
        async with client.generate(
            work.prompt,
            temperature=options.temperature,
            seed=work.seed,
            max_tokens=work.max_tokens,
            ignore_eos=options.ignore_eos,
            graph_policy=options.graph_policy,
            timeout=options.timeout_seconds,
        ) as stream:
            async for event in stream:
                if isinstance(event, Tokens):
                    if event.token_ids:
                        sample.num_events += 1
                        sample.token_times.extend([clock.now()] * len(event.token_ids))
                        if options.keeps_tokens:
                            sample.token_ids.extend(event.token_ids)
                elif isinstance(event, Finished):
                    finished = event
        self._check(work, sample, finished)

    def _check(self, work: Work, sample: Sample, finished: Finished | None) -> None:
        """A stream that ended without an error went well only when all of it came."""
        if finished is None:
            sample.fail(STREAM_LOST, "the stream ended without its last message")
            return
        sample.num_prompt_tokens = finished.usage.prompt_tokens
        sample.server = ServerView(
            queue_seconds=finished.timings.queue_seconds,
            prefill_seconds=finished.timings.prefill_seconds,
            time_to_first_token_seconds=finished.timings.time_to_first_token_seconds,
            total_seconds=finished.timings.total_seconds,
            num_prompt_tokens=finished.usage.prompt_tokens,
            num_cached_prompt_tokens=finished.usage.cached_prompt_tokens,
            num_graph_steps=finished.receipt.num_graph_steps,
            num_eager_steps=finished.receipt.num_eager_steps,
            num_preemptions=finished.receipt.num_preemptions,
        )
        num_tokens = sample.num_output_tokens
        if num_tokens != finished.usage.completion_tokens:
            sample.fail(WRONG_LENGTH, f"{num_tokens} tokens came, the server says {finished.usage.completion_tokens}")
        elif num_tokens == 0 or (self._options.ignore_eos and num_tokens != work.max_tokens):
            sample.fail(WRONG_LENGTH, f"{num_tokens} tokens came, {work.max_tokens} were asked for")
