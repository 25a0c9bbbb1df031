"""Our errors as gRPC statuses: the one table of codes, and the google.rpc details that go with each. It sends nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # its stubs come without py.typed

from hotgraph_server import errors

DOMAIN: Final = "hotgraph"
DETAILS_KEY: Final = "grpc-status-details-bin"
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"  # what gRPC's own retry policy obeys; it does not read RetryInfo

# A client refuses trailers beyond 8 KiB or so, and would then see neither the code nor the details.
MAX_MESSAGE_BYTES: Final = 512
MAX_VIOLATIONS: Final = 24
MAX_NAME_BYTES: Final = 128

CODES: Final[dict[type[errors.HotgraphError], grpc.StatusCode]] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.MalformedMessageError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextLengthError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.GraphNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.ServiceNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.MessageTooLargeError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    errors.NotPossibleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.EventsGoneError: grpc.StatusCode.OUT_OF_RANGE,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.GraphNotReadyError: grpc.StatusCode.UNAVAILABLE,
    errors.LoadingError: grpc.StatusCode.UNAVAILABLE,
    errors.DrainingError: grpc.StatusCode.UNAVAILABLE,
    errors.EngineFailedError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.ServerTimeLimitError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CancelledRequestError: grpc.StatusCode.CANCELLED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}


@dataclass(frozen=True, slots=True)
class CallStatus:
    """What a failed call ends with. `trailing_metadata` holds the packed google.rpc.Status."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def code_of(error: errors.HotgraphError) -> grpc.StatusCode | None:
    """The code of the error's class or of its nearest listed parent; None when neither is listed."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return None


def status_of(error: errors.HotgraphError, *, request_id: str = "") -> CallStatus:
    """The status of an error that a client may see. Raises KeyError for one it may not (those that end the process)."""
    code = code_of(error)
    if code is None:
        raise KeyError(f"{type(error).__name__} is no error of a call")
    text = _shortened(error.message, MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in _details(error, request_id):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    trailing: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
    if isinstance(error, errors.RetryableError):
        trailing.append((PUSHBACK_KEY, _pushback(error)))
    return CallStatus(code, text, tuple(trailing))


def _pushback(error: errors.RetryableError) -> str:
    """Milliseconds after which gRPC itself may try again. Negative, never, for who asked to fail fast."""
    if isinstance(error, errors.GraphNotReadyError):
        return "-1"
    return str(math.ceil(error.retry_after_seconds * 1000))


def _details(error: errors.HotgraphError, request_id: str) -> list[message.Message]:
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    violations = _violations(error)
    if violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in violations[:MAX_VIOLATIONS]:
            bad_request.field_violations.add(field=violation.field, description=violation.description)
        details.append(bad_request)
    if isinstance(error, errors.RetryableError):
        seconds, fraction = divmod(max(error.retry_after_seconds, 0.0), 1)
        delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(fraction * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, errors.NotFoundError):
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=error.resource_type, resource_name=_shortened(error.name, MAX_NAME_BYTES)
            )
        )
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    return details


def _violations(error: errors.HotgraphError) -> tuple[errors.Violation, ...]:
    """Every INVALID_ARGUMENT names a field, so that a caller has one way to look."""
    match error:
        case errors.InvalidRequestError():
            return error.violations
        case errors.ContextLengthError():
            field = "prompt" if error.prompt_tokens >= error.limit else "max_tokens"
            return (errors.Violation(field, error.message),)
        case errors.MalformedMessageError():
            return (errors.Violation("(message)", error.message),)
        case _:
            return ()


def _shortened(text: str, max_bytes: int) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= max_bytes:
        return text
    return encoded[: max_bytes - 3].decode(errors="ignore") + "..."
