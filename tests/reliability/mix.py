"""What clients do, all kinds of them at once and by weight: what each call must give is known beforehand, and is looked at.

It knows the client, the contract and the fake engine's rule. That a daemon may be away meanwhile is its caller's matter: a
call that failed raises, and one that was answered wrongly says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from grpc_reflection.v1alpha import reflection_pb2

from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_client import (
    AsyncClient,
    DaemonState,
    DeadlineError,
    GraphNotFoundError,
    GraphState,
    Health,
    HotgraphError,
    NotPossibleError,
    ResumePolicy,
)
from hotgraph_server.rpc.reflection import METHOD, V1_SERVICE
from hotgraph_server.rpc.server import OUR_SERVICES
from hotgraph_server.text import ByteTokenizer
from tests.integration.harness import Caller, stream_refused
from tests.integration.refusals import ROWS
from tests.reliability.attackers import GENERATE
from tests.reliability.history import Record, violations, violations_of_a_part, violations_of_an_answer
from tests.reliability.wire import wire

ENDLESS: Final = ResumePolicy(
    max_losses=10_000, max_attempts=10_000, first_backoff_seconds=0.05, max_backoff_seconds=0.5
)
RECONNECT: Final = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)  # the client's own
NUM_CLIENTS: Final = 6
LONG_TOKENS: Final = 900  # more than anyone waits for here
TOKENIZER: Final = ByteTokenizer()


class FailedError(Exception):
    """A call over plain stubs or bare sockets failed."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Callers:
    """Connections that the calls share, and what they found out on the way."""

    address: str
    chance: random.Random
    clients: list[AsyncClient] = field(default_factory=list)
    num_resumes: int = 0

    async def __aenter__(self) -> Callers:
        self.clients = [
            AsyncClient(self.address, resume_policy=ENDLESS, wait_for_ready=True) for _ in range(NUM_CLIENTS)
        ]
        self.plain = Caller(self.address, options=RECONNECT)
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self.clients:
            await client.close()
        await self.plain.channel.close()

    @property
    def client(self) -> AsyncClient:
        """One of them."""
        return self.chance.choice(self.clients)

    def text(self) -> str:
        """Most prompts are short; some take several steps."""
        length = self.chance.randint(300, 700) if self.chance.random() < 0.1 else self.chance.randint(1, 40)
        return "".join(self.chance.choices("abcdefghijklmnopqrstuvwxyz .,", k=length))

    def asked(self, prompt_token_ids: list[int]) -> tuple[Record, dict[str, Any]]:
        """A request of some length, greedy or seeded: what to expect, and the client's options."""
        seed = self.chance.choice((None, self.chance.getrandbits(32)))
        record = Record(tuple(prompt_token_ids), self.chance.randint(1, 80), seed)
        sampling = {"temperature": 0.0} if seed is None else {"temperature": 1.0, "seed": seed}
        return record, {"max_tokens": record.max_tokens, **sampling}


# What was answered wrongly, in words. Raises HotgraphError, AioRpcError or FailedError for a call that failed.
Kind = Callable[[Callers], Awaitable[list[str]]]


async def read(callers: Callers, prompt: Any, record: Record, pause_seconds: float = 0.0, **options: Any) -> list[str]:
    """Reads a stream, which goes on after a lost daemon."""
    generation = callers.client.generate(prompt, **options)
    try:
        async for event in generation:
            record.events.append(event)
            if pause_seconds:
                await asyncio.sleep(pause_seconds)
    except HotgraphError as error:
        if found := violations_of_a_part(record):
            return [*found, str(error)]
        raise
    finally:
        callers.num_resumes += generation.num_resumes
    return violations(record)


async def check_serving(client: AsyncClient, service: str = "") -> None:
    """Who says that it does not serve is as good as away."""
    if (found := await client.check_health(service)) is not Health.SERVING:
        raise FailedError("UNAVAILABLE", found.value)


async def stream(callers: Callers) -> list[str]:
    text = callers.text()
    record, options = callers.asked(TOKENIZER.encode(text))
    return await read(callers, text, record, **options)


async def chat(callers: Callers) -> list[str]:
    turns = [("system", "Be brief."), ("user", callers.text()), ("assistant", callers.text()[:50]), ("user", "and?")]
    record, options = callers.asked(TOKENIZER.encode_chat(turns))
    return await read(callers, [{"role": role, "content": content} for role, content in turns], record, **options)


async def slow_reader(callers: Callers) -> list[str]:
    ids = TOKENIZER.encode(callers.text())
    record, options = callers.asked(ids)
    return await read(callers, ids, record, pause_seconds=callers.chance.uniform(0.005, 0.02), **options)


async def complete(callers: Callers) -> list[str]:
    text = callers.text()
    record, options = callers.asked(TOKENIZER.encode(text))
    return violations_of_an_answer(record, await callers.client.complete(text, resume=False, **options))


async def cancel(callers: Callers) -> list[str]:
    text = callers.text()
    record, options = callers.asked(TOKENIZER.encode(text))
    record.max_tokens = LONG_TOKENS
    options["max_tokens"] = LONG_TOKENS - len(text)
    generation = callers.client.generate(text, resume=False, **options)
    for _ in range(callers.chance.randint(0, 10)):
        record.events.append(await anext(generation))
    await asyncio.sleep(callers.chance.uniform(0, 0.01))
    generation.cancel()
    return violations_of_a_part(record)


async def short_deadline(callers: Callers) -> list[str]:
    seconds = callers.chance.uniform(0.002, 0.05)
    try:
        if callers.chance.random() < 0.5:
            await callers.client.complete("late", max_tokens=LONG_TOKENS, timeout=seconds, resume=False)
        else:  # the daemon alone knows of the time
            request = CompleteRequest(text="w", max_tokens=LONG_TOKENS, timeout=Duration(nanos=int(seconds * 1e9)))
            await callers.plain.inference.Complete(request, wait_for_ready=True)
    except DeadlineError:
        return []
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return []
        raise
    return ["answered after its deadline"]


async def invalid(callers: Callers) -> list[str]:
    row = callers.chance.choice(ROWS)
    error = await stream_refused(callers.plain.inference.Generate(GenerateRequest(**row.request), wait_for_ready=True))
    if error.code is row.code:
        wrong = (error.reason, error.fields) != (row.reason, sorted(row.fields))
        return [f"{row.name}: refused with {error.reason} for {error.fields}"] if wrong else []
    raise FailedError(error.code.name, error.message)


async def connections(callers: Callers) -> list[str]:
    """Twenty at once, each for two calls."""

    async def one() -> list[str]:
        async with AsyncClient(callers.address) as client:
            await check_serving(client)
            record = Record(tuple(TOKENIZER.encode("hello")), 3, None)
            answer = await client.complete("hello", max_tokens=3, temperature=0.0, resume=False)
            return violations_of_an_answer(record, answer)

    found = await asyncio.gather(*(one() for _ in range(20)), return_exceptions=True)
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return [words for outcome in found if isinstance(outcome, list) for words in outcome]


async def never_reads(callers: Callers) -> list[str]:
    """Two streams on a connection whose window is all but closed; after a while their caller goes."""
    request = GenerateRequest(text=callers.text(), max_tokens=100).SerializeToString()
    try:
        async with wire(callers.address, reads=False, window_bytes=100) as connection:
            for _ in range(2):
                connection.call(GENERATE, request)
            await asyncio.sleep(callers.chance.uniform(0.2, 1.0))
    except (OSError, TimeoutError) as error:
        raise FailedError("UNAVAILABLE", str(error)) from error
    return []


async def models(callers: Callers) -> list[str]:
    client, text = callers.client, callers.text()
    found = []
    if [model.id for model in await client.list_models()] != ["fake"]:
        found.append("the models are others")
    if (await client.get_model("fake")).context_length != 1024:
        found.append("the model is another")
    token_ids = (await client.tokenize(text)).token_ids
    if list(token_ids) != TOKENIZER.encode(text) or await client.detokenize(token_ids) != text:
        found.append("the tokens are others")
    return found


async def graphs(callers: Callers) -> list[str]:
    """Looks at the cache, and throws a graph out now and then, so that there is something to capture."""
    client = callers.client
    listed = await client.list_graphs([GraphState.READY])
    if any(graph.state is not GraphState.READY for graph in listed):
        return ["listed are others than was asked for"]
    await client.get_budget()
    await client.export_profile()
    with contextlib.suppress(GraphNotFoundError, NotPossibleError):  # another caller was quicker
        if listed:
            name = callers.chance.choice(listed).name
            if (await client.get_graph(name)).name != name:
                return ["got another graph"]
            if callers.chance.random() < 0.5:
                await client.evict_graph(name)
    return []


async def health(callers: Callers) -> list[str]:
    await check_serving(callers.client, callers.chance.choice(("", *OUR_SERVICES)))
    return []


async def status(callers: Callers) -> list[str]:
    client = callers.client
    await client.list_clients()
    found = await client.get_status()
    if found.state is not DaemonState.SERVING:
        raise FailedError("UNAVAILABLE", found.state.value)
    return [] if found.model == "fake" else [f"serves {found.model!r}"]


async def reflection(callers: Callers) -> list[str]:
    async def sent() -> Any:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    dial = callers.plain.channel.stream_stream(
        f"/{V1_SERVICE}/{METHOD}",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    names = {s.name async for r in dial(sent(), wait_for_ready=True) for s in r.list_services_response.service}
    return [] if names >= set(OUR_SERVICES) else [f"only {names} are told"]


WEIGHTS: Final[dict[Kind, int]] = {
    stream: 20,
    complete: 15,
    chat: 10,
    cancel: 10,
    short_deadline: 8,
    health: 8,
    invalid: 8,
    models: 5,
    graphs: 5,
    slow_reader: 3,
    status: 3,
    connections: 2,
    reflection: 2,
    never_reads: 1,
}


def choose(chance: random.Random) -> Kind:
    """One kind, by weight."""
    return chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
