"""InferenceService: each call checks, asks the scheduler or the tokenizer, and answers. Errors are the guard's to send."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import grpc.aio

from graphcache import Clock
from hotgraph.v1 import generation_pb2, inference_service_pb2, inference_service_pb2_grpc, model_pb2
from hotgraph_server.config import Settings
from hotgraph_server.errors import (
    DeadlineError,
    InvalidRequestError,
    ServerTimeLimitError,
    Violation,
)
from hotgraph_server.request import FinishedEvent, Request, TokensEvent
from hotgraph_server.rpc import validate
from hotgraph_server.rpc.clients import Client, ClientRegistry
from hotgraph_server.rpc.lifecycle import Lifecycle, ServedModel
from hotgraph_server.rpc.wire import generation, model
from hotgraph_server.rpc.wire.common import from_duration
from hotgraph_server.rpc.writes import WriteLimit

logger = logging.getLogger("hotgraph.rpc")

Context = grpc.aio.ServicerContext[Any, Any]
Result = TypeVar("Result")

NUM_TEXT_THREADS: Final = 2
INLINE_TEXT_BYTES: Final = 4096  # tokenized on the loop: about as quick as the way to a thread and back
INLINE_NUM_TOKENS: Final = 2048  # likewise for turning tokens to text
LATE_SECONDS: Final = 1.0  # after the deadline, a handler still inside is stuck in a write: its reader does not read
# For gRPC to end a call whose own deadline has passed. A status that is sent meanwhile reaches nobody, and each one that fails
# leaves some hundred bytes behind for good (grpcio 1.85.1).
GRPC_LATE_SECONDS: Final = 0.1
# For gRPC to take one message. It takes tens of kilobytes before the first that waits, so who is this late does not read.
WRITE_SECONDS: Final = 10.0
# Started waits for so long, or for the first token: the engine's thread launches the first step now, and shares the
# interpreter's lock with this one. Written at once, Started held that step up for longer than its writing takes.
STARTED_DELAY_SECONDS: Final = 0.001  # uvloop's timers know no shorter time
MODELS_PAGE_SIZE: Final = 50
MAX_MODELS_PAGE_SIZE: Final = 100


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Generates, counts tokens and describes the model."""

    def __init__(self, lifecycle: Lifecycle, clients: ClientRegistry, settings: Settings, clock: Clock) -> None:
        """`clock` is the scheduler's."""
        self._lifecycle = lifecycle
        self._clients = clients
        self._settings = settings
        self._clock = clock
        self._writes = WriteLimit(WRITE_SECONDS)
        self._text_threads = ThreadPoolExecutor(NUM_TEXT_THREADS, thread_name_prefix="hotgraph-text")

    def apply(self, settings: Settings) -> None:
        """Takes over default_max_tokens, for requests to come."""
        self._settings = settings

    def close(self) -> None:
        """Ends its threads; texts still waiting for them are dropped."""
        self._text_threads.shutdown(wait=False, cancel_futures=True)

    # A coroutine that writes, not an async generator: a generator blocked in a write is ended by GeneratorExit, at a time
    # of the garbage collector's choosing, and cleaning up must not depend on that.
    async def Generate(  # type: ignore[override]  # noqa: N802  (the stubs know generators only; the contract's name)
        self, request: inference_service_pb2.GenerateRequest, context: Context
    ) -> None:
        respond = inference_service_pb2.GenerateResponse
        async with (
            self._accepted(request, context) as (prepared, served, client),
            served.scheduler.submit(prepared) as stream,
        ):
            served.scheduler.advance()
            await stream.wait(STARTED_DELAY_SECONDS)
            write = self._writes.write
            await write(context.write(respond(started=generation.started_message(prepared, served.model_id))))
            async for event in stream:
                if isinstance(event, TokensEvent):
                    client.num_completion_tokens += len(event.token_ids)
                    await write(context.write(respond(tokens=generation.tokens_message(event, served.tokenizer))))
                else:
                    await write(context.write(respond(finished=generation.finished_message(event))))

    async def Complete(  # noqa: N802
        self, request: inference_service_pb2.CompleteRequest, context: Context
    ) -> inference_service_pb2.CompleteResponse:
        choices: dict[int, TokensEvent] = {}
        finished: FinishedEvent | None = None
        async with (
            self._accepted(request, context) as (prepared, served, client),
            served.scheduler.submit(prepared) as stream,
        ):
            async for event in stream:
                if isinstance(event, TokensEvent):
                    client.num_completion_tokens += len(event.token_ids)
                    _join(choices, event)
                else:
                    finished = event
        if finished is None:
            raise RuntimeError("a stream ended without its last event")
        usage, timings, receipt = generation.finished_fields(finished)
        return inference_service_pb2.CompleteResponse(
            request_id=prepared.request_id,
            model=served.model_id,
            seed=prepared.sampling.seed,
            choices=[generation.choice_message(choices[index], served.tokenizer) for index in sorted(choices)],
            usage=usage,
            timings=timings,
            receipt=receipt,
        )

    async def Tokenize(  # noqa: N802
        self, request: inference_service_pb2.TokenizeRequest, context: Context
    ) -> inference_service_pb2.TokenizeResponse:
        served = self._served(request.model)
        validate.check_tokenize(request)
        add_special_tokens = request.add_special_tokens if request.HasField("add_special_tokens") else True
        if request.WhichOneof("input") == "chat":
            token_ids = await self._encode_chat(served, request.chat)
        else:
            token_ids = await self._encode_text(served, request.text, add_special_tokens)
        pieces = await self._off_the_loop(
            len(token_ids) > INLINE_NUM_TOKENS,
            lambda: [served.tokenizer.piece(token_id) for token_id in token_ids],
        )
        return inference_service_pb2.TokenizeResponse(
            token_ids=token_ids, pieces=pieces, context_length=served.info.context_length
        )

    async def Detokenize(  # noqa: N802
        self, request: inference_service_pb2.DetokenizeRequest, context: Context
    ) -> inference_service_pb2.DetokenizeResponse:
        served = self._served(request.model)
        validate.check_detokenize(request, _limits(served))
        token_ids = list(request.token_ids)
        skip_special_tokens = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await self._off_the_loop(
            len(token_ids) > INLINE_NUM_TOKENS,
            lambda: served.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens),
        )
        return inference_service_pb2.DetokenizeResponse(text=text)

    async def ListModels(  # noqa: N802
        self, request: inference_service_pb2.ListModelsRequest, context: Context
    ) -> inference_service_pb2.ListModelsResponse:
        served = self._lifecycle.require()
        validate.check_page_size(request.page_size, default=MODELS_PAGE_SIZE, maximum=MAX_MODELS_PAGE_SIZE)
        if request.page_token:  # one model fills no second page
            raise InvalidRequestError([Violation("page_token", "is none that this server gave")])
        return inference_service_pb2.ListModelsResponse(models=[self._model_message(served)])

    async def GetModel(  # noqa: N802
        self, request: inference_service_pb2.GetModelRequest, context: Context
    ) -> inference_service_pb2.GetModelResponse:
        return inference_service_pb2.GetModelResponse(model=self._model_message(self._served(request.name)))

    # What the calls share.

    def _served(self, name: str) -> ServedModel:
        served = self._lifecycle.require()
        served.check_name(name)
        return served

    def _model_message(self, served: ServedModel) -> model_pb2.Model:
        return model.model_message(
            served.model_id,
            served.info,
            served.tokenizer,
            default_max_tokens=self._settings.scheduler.default_max_tokens,
            max_request_seconds=self._settings.server.max_request_seconds,
        )

    @asynccontextmanager
    async def _accepted(
        self, message: generation.GenerationRequest, context: Context
    ) -> AsyncIterator[tuple[Request, ServedModel, Client]]:
        """The request, checked and tokenized, in the care of its deadline and counted for its client while inside."""
        deadline = self._deadline(message, context)
        client = self._clients.touch(context)
        served = self._served(message.model)
        limits = _limits(served)
        validate.check_generation(message, limits)
        remaining_seconds = deadline.monotonic - self._clock.monotonic()
        with client.request():
            try:
                async with asyncio.timeout(max(remaining_seconds, 0.0) + LATE_SECONDS):
                    prompt_token_ids = await self._prompt(served, message)
                    prepared = self._request(message, prompt_token_ids, served, deadline, client)
                    client.num_prompt_tokens += len(prompt_token_ids)
                    yield prepared, served, client
            except DeadlineError:
                if deadline.is_calls:
                    await asyncio.sleep(GRPC_LATE_SECONDS)  # in which this task is cancelled
                raise
            except TimeoutError:
                if deadline.is_server_limit:
                    raise ServerTimeLimitError("the server's time limit for one request passed") from None
                raise DeadlineError("the request's deadline passed") from None

    def _deadline(self, message: generation.GenerationRequest, context: Context) -> generation.Deadline:
        """The nearest of the call's deadline, the request's timeout and the server's limit.

        gRPC computes the time remaining from the wall clock, so it is read once, here, and kept on the monotonic one.
        """
        now = self._clock.monotonic()
        call_seconds = caller_seconds = context.time_remaining()
        if message.HasField("timeout"):
            timeout_seconds = from_duration(message.timeout)
            caller_seconds = timeout_seconds if call_seconds is None else min(call_seconds, timeout_seconds)
        limit_seconds = self._settings.server.max_request_seconds
        if caller_seconds is None or caller_seconds > limit_seconds:
            return generation.Deadline(now + limit_seconds, is_server_limit=True)
        return generation.Deadline(now + caller_seconds, is_server_limit=False, is_calls=caller_seconds == call_seconds)

    def _request(
        self,
        message: generation.GenerationRequest,
        prompt_token_ids: Sequence[int],
        served: ServedModel,
        deadline: generation.Deadline,
        client: Client,
    ) -> Request:
        max_tokens = message.max_tokens
        if not message.HasField("max_tokens"):
            room = served.info.context_length - len(prompt_token_ids)
            max_tokens = max(1, min(self._settings.scheduler.default_max_tokens, room))
        found = validate.Violations()
        for index, choice in enumerate(message.resume):
            found.at_most(f"resume[{index}].token_ids", len(choice.token_ids), max_tokens, "token ids")
        if message.stop.min_tokens > max_tokens:
            found.add("stop.min_tokens", f"must be at most max_tokens, {max_tokens}")
        found.raise_any()
        return generation.request_from(
            message,
            prompt_token_ids=prompt_token_ids,
            max_tokens=max_tokens,
            vocabulary_size=served.info.vocabulary_size,
            deadline=deadline,
            client=client.identity,
        )

    async def _prompt(self, served: ServedModel, message: generation.GenerationRequest) -> Sequence[int]:
        match message.WhichOneof("prompt"):
            case "token_ids":
                return message.token_ids.ids[:]
            case "chat":
                return await self._encode_chat(served, message.chat)
            case _:
                add_special_tokens = message.add_special_tokens if message.HasField("add_special_tokens") else True
                return await self._encode_text(served, message.text, add_special_tokens)

    def _encode_text(self, served: ServedModel, text: str, add_special_tokens: bool) -> Awaitable[list[int]]:
        return self._off_the_loop(
            len(text) > INLINE_TEXT_BYTES,
            lambda: served.tokenizer.encode(text, add_special_tokens=add_special_tokens),
        )

    def _encode_chat(self, served: ServedModel, chat: generation_pb2.ChatPrompt) -> Awaitable[list[int]]:
        messages = generation.prompt_messages(chat)
        add_generation_prompt = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        return self._off_the_loop(
            sum(len(content) for _, content in messages) > INLINE_TEXT_BYTES,
            lambda: served.tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt),
        )

    async def _off_the_loop(self, is_long: bool, work: Callable[[], Result]) -> Result:
        """Runs the work here when it is short, else in a thread, so that other streams go on meanwhile."""
        if not is_long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, work)


def _limits(served: ServedModel) -> validate.ModelLimits:
    return validate.ModelLimits(vocabulary_size=served.info.vocabulary_size, context_length=served.info.context_length)


def _join(choices: dict[int, TokensEvent], event: TokensEvent) -> None:
    whole = choices.setdefault(event.choice_index, event)
    if whole is not event:
        whole.token_ids += event.token_ids
        whole.text += event.text
        whole.logprobs += event.logprobs
        whole.finish = event.finish
