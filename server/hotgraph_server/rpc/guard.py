"""The interceptor every call passes: may they, bytes to message, errors to statuses, nothing of our inside outwards.

It knows no service, and not who may what: what a message means is the servicers' matter. gRPC alone would answer a malformed
message or an unexpected exception with UNKNOWN and the Python class, and would leave the client of a handler that cancelled
itself without any answer.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, Never, TypeAlias, cast

import grpc.aio
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from hotgraph_server.errors import (
    DrainingError,
    HotgraphError,
    InternalError,
    InvalidRequestError,
    MalformedMessageError,
    MessageTooLargeError,
    NotPossibleError,
    Violation,
)
from hotgraph_server.rpc.call import Call, CallObserver, trace_context
from hotgraph_server.rpc.status import code_of, status_of
from hotgraph_server.rpc.validate import is_identifier

logger = logging.getLogger("hotgraph.rpc")

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in its stubs only
Behaviour = Callable[[Any, Context], Awaitable[Any]]
Authorise = Callable[[str, Context], object]
Admit = Callable[[str, Context], None]

INTERRUPTED_RETRY_SECONDS: Final = 1.0
STATUS_SECONDS: Final = 2.0  # to hand a status over; longer only when the client reads nothing any more


class ActiveCalls:
    """How many calls of our services are inside, so that stopping can wait for their last words."""

    def __init__(self) -> None:
        self._count = 0
        self._num_begun = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def count(self) -> int:
        return self._count

    @contextmanager
    def one(self) -> Iterator[None]:
        self._count += 1
        self._num_begun += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    async def wait_quiet(self, seconds: float) -> None:
        """Until none has been inside for so long."""
        num_begun = -1
        while num_begun != self._num_begun:
            await self._idle.wait()
            num_begun = self._num_begun
            await asyncio.sleep(seconds)


class Guard(grpc.aio.ServerInterceptor):
    """Replaces all handlers: each asks `authorise` first, with the method's full name and the context. What it raises ends
    the call. Of other services than `services` nothing else is changed.

    `admit` is called with the method's full name and the context before the message is looked at; what it raises ends the
    call. `max_message_bytes` bounds requests and unary answers, unpacked: the library's own refusal carries no details, so it
    must be told a higher limit. `calls` counts for several guards at once.
    """

    def __init__(
        self,
        services: Collection[str],
        *,
        authorise: Authorise,
        admit: Admit,
        max_message_bytes: int,
        calls: ActiveCalls | None = None,
    ) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)
        self._authorise = authorise
        self._admit = admit
        self._max_message_bytes = max_message_bytes
        self._handlers: dict[str, Handler] = {}
        self.calls = calls or ActiveCalls()
        self.observer: CallObserver | None = None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        method = handler_call_details.method
        guarded = self._handlers.get(method)
        if guarded is not None:
            return guarded
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        is_ours = method.startswith(self._prefixes)
        guarded = self._handlers[method] = (self._guarded if is_ours else self._authorised)(method, handler)
        return guarded

    def _authorised(self, method: str, handler: Handler) -> Handler:
        """The handler of a standard service, which answers in its own way whoever may call it."""
        parse, serialize = handler.request_deserializer, handler.response_serializer
        unary: Any = handler.unary_unary or handler.unary_stream
        stream: Any = handler.stream_stream

        async def authorise(context: Context) -> None:
            try:
                self._authorise(method, context)
            except HotgraphError as error:
                await _abort(context, Call(method), error)

        async def serve(request: Any, context: Context) -> Any:
            await authorise(context)
            return await unary(request, context)

        async def serve_stream(requests: Any, context: Context) -> AsyncIterator[Any]:
            await authorise(context)
            async for response in stream(requests, context):
                yield response

        if inspect.iscoroutinefunction(unary):
            wrap = grpc.unary_unary_rpc_method_handler if handler.unary_unary else grpc.unary_stream_rpc_method_handler
            return wrap(serve, parse, serialize)
        if inspect.isasyncgenfunction(stream):
            return grpc.stream_stream_rpc_method_handler(serve_stream, parse, serialize)
        raise TypeError(f"{method} has a handler of a kind that is not known here")

    def _guarded(self, method: str, handler: Handler) -> Handler:
        parse, serialize = handler.request_deserializer, handler.response_serializer
        if handler.request_streaming or parse is None or serialize is None:
            raise TypeError(f"{method} is no unary or server-streaming method")
        if handler.response_streaming:
            stream = cast(Behaviour, handler.unary_stream)  # the stubs know the blocking kind only

            async def serve_stream(data: bytes, context: Context) -> None:
                with self.calls.one():
                    await self._run(method, parse, stream, data, context)

            return grpc.unary_stream_rpc_method_handler(serve_stream, None, serialize)

        unary = self._serialized(cast(Behaviour, handler.unary_unary), serialize)

        async def serve_unary(data: bytes, context: Context) -> Any:
            with self.calls.one():
                return await self._run(method, parse, unary, data, context)

        return grpc.unary_unary_rpc_method_handler(serve_unary, None, None)

    def _serialized(self, behaviour: Behaviour, serialize: Callable[[Any], bytes]) -> Behaviour:
        """The behaviour with its answer as bytes: gRPC leaves the client waiting when it may not send what it is given."""

        async def answer(request: Message, context: Context) -> bytes:
            data = serialize(await behaviour(request, context))
            if len(data) > self._max_message_bytes:
                raise NotPossibleError(
                    f"the answer has {len(data)} bytes, more than the {self._max_message_bytes} of one message",
                    metadata={"limit_bytes": str(self._max_message_bytes), "size_bytes": str(len(data))},
                )
            return data

        return answer

    async def _run(
        self,
        method: str,
        parse: Callable[[bytes], Message],
        behaviour: Behaviour,
        data: bytes,
        context: Context,
    ) -> Any:
        call = Call(method)
        try:
            return await self._answer(call, parse, behaviour, data, context)
        except BaseException:
            call.leave(context)
            raise
        finally:
            call.end(self.observer)

    async def _answer(
        self,
        call: Call,
        parse: Callable[[bytes], Message],
        behaviour: Behaviour,
        data: bytes,
        context: Context,
    ) -> Any:
        method = call.method
        try:
            self._authorise(method, context)
            self._admit(method, context)
            if len(data) > self._max_message_bytes:
                raise MessageTooLargeError(limit_bytes=self._max_message_bytes, size_bytes=len(data))
            request = parse_request(parse, data)
            call.request_id = named_request(request)
            if self.observer is not None:
                call.trace_context = trace_context(context)
                self.observer.call_begun(call)
            return await behaviour(request, context)
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise  # the status is sent, or the connection is gone: InternalError is gRPC's own, for a failed operation
        except HotgraphError as error:
            await _abort(context, call, error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # the client left, its deadline passed, or the server stops the call
            logger.warning("%s was interrupted by the server itself", method, exc_info=True)
            interrupted = DrainingError("the call was interrupted", retry_after_seconds=INTERRUPTED_RETRY_SECONDS)
            await _abort(context, call, interrupted)
        except Exception as error:
            await _abort(context, call, _incident(call, error))


async def _abort(context: Context, call: Call, error: HotgraphError) -> Never:
    if code_of(error) is None:  # one of those that end the process: no caller's business
        error = _incident(call, error)
    status = status_of(error, request_id=call.request_id)
    call.fail(status, error.reason)
    logger.debug("%s ends with %s: %s", call.method, status.code.name, status.message)
    try:
        async with asyncio.timeout(STATUS_SECONDS):
            await context.abort(status.code, status.message, status.trailing_metadata)
    except (TimeoutError, grpc.aio.InternalError):
        # The status stands behind messages that the client does not read, or a write was given up, after which gRPC takes no
        # other. It drops the call when its handler is gone.
        raise asyncio.CancelledError("the client does not read") from None


def _incident(call: Call, error: BaseException) -> InternalError:
    """Logs what happened under a fresh id; the id is all that the caller gets."""
    incident = uuid.uuid4().hex
    fields = {"request_id": call.request_id} if call.request_id else {}
    logger.error("%s failed, incident %s", call.method, incident, exc_info=error, extra=fields)
    return InternalError(incident)


def parse_request(parse: Callable[[bytes], Message], data: bytes) -> Message:
    """Raises MalformedMessageError, or InvalidRequestError when a oneof was set twice."""
    try:
        request = parse(data)
    except DecodeError:
        raise MalformedMessageError("the message is no valid protobuf message of the method's request type") from None
    doubled = doubled_oneofs(request, data)
    if doubled:
        raise InvalidRequestError([Violation(name, "more than one of its kinds is set") for name in doubled])
    return request


def named_request(request: Message) -> str:
    """The request's id, made here when the caller gave none. Empty for requests without one, or with an unusable one."""
    if "request_id" not in request.DESCRIPTOR.fields_by_name:
        return ""
    request_id: str = getattr(request, "request_id")  # noqa: B009  (the message's type is not known here)
    if request_id:
        return request_id if is_identifier(request_id) else ""
    request_id = os.urandom(16).hex()
    setattr(request, "request_id", request_id)  # noqa: B010
    return request_id


# Wire types of the protobuf encoding.
_VARINT, _FIXED64, _BYTES, _GROUP_START, _GROUP_END, _FIXED32 = range(6)


def doubled_oneofs(message: Message, data: bytes) -> list[str]:
    """The oneofs of which `data` sets two different members. A parser keeps the last one only, and tells nobody.

    `data` is what the message was parsed from, so it is well formed.
    """
    owners = _owners(message.DESCRIPTOR)
    if not owners:
        return []
    seen: dict[str, int] = {}
    doubled: list[str] = []
    for number in _top_level_fields(data):
        name = owners.get(number)
        if name is not None and seen.setdefault(name, number) != number and name not in doubled:
            doubled.append(name)
    return doubled


@cache
def _owners(kind: Descriptor) -> dict[int, str]:
    """The names of a message type's oneofs, by the numbers of their fields. Those of one field, as optional ones, left out."""
    return {field.number: oneof.name for oneof in kind.oneofs if len(oneof.fields) > 1 for field in oneof.fields}


def _top_level_fields(data: bytes) -> Iterator[int]:
    position, depth = 0, 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type == _FIXED64:
            position += 8
        elif wire_type == _FIXED32:
            position += 4
        elif wire_type == _BYTES:
            length, position = _varint(data, position)
            position += length
        elif wire_type == _GROUP_START:
            depth += 1
            continue
        else:
            depth -= 1
            continue
        if not depth:
            yield number


def _varint(data: bytes, position: int) -> tuple[int, int]:
    if data[position] < 0x80:
        return data[position], position + 1
    value, shift = 0, 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
