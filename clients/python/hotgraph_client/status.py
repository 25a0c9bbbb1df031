"""Turns a gRPC status and its google.rpc details into an error of `errors.py`. The only place that reads details.

A status with ErrorInfo of the domain "hotgraph" is the daemon's own word and goes by its reason. Any other is bare: it comes
from gRPC or a proxy and goes by its code.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # its stubs come without py.typed

from hotgraph_client import errors

DOMAIN = "hotgraph"
DETAILS_KEY = "grpc-status-details-bin"

ERROR_BY_REASON: dict[str, type[errors.HotgraphError]] = {
    "INVALID_REQUEST": errors.InvalidRequestError,
    "MALFORMED_MESSAGE": errors.MalformedMessageError,
    "MESSAGE_TOO_LARGE": errors.MessageTooLargeError,
    "SERVICE_NOT_FOUND": errors.ServiceNotFoundError,
    "CONTEXT_LENGTH": errors.ContextLengthError,
    "MODEL_NOT_FOUND": errors.ModelNotFoundError,
    "GRAPH_NOT_FOUND": errors.GraphNotFoundError,
    "DUPLICATE_REQUEST": errors.DuplicateRequestError,
    "NOT_POSSIBLE": errors.NotPossibleError,
    "QUEUE_FULL": errors.QueueFullError,
    "GRAPH_NOT_READY": errors.GraphNotReadyError,
    "LOADING": errors.LoadingError,
    "DRAINING": errors.DrainingError,
    "ENGINE_FAILED": errors.EngineFailedError,
    "DEADLINE_EXCEEDED": errors.DeadlineError,
    "SERVER_TIME_LIMIT": errors.ServerTimeLimitError,
    "CANCELLED": errors.CancelledRequestError,
    "EVENTS_GONE": errors.EventsGoneError,
    "INTERNAL": errors.InternalError,
    "UNAUTHENTICATED": errors.UnauthenticatedError,
    "PERMISSION_DENIED": errors.PermissionDeniedError,
}
"""Reasons of the contract's ErrorReason. One that is not here (a newer server's) goes by the code."""

ERROR_BY_CODE: dict[grpc.StatusCode, type[errors.HotgraphError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: errors.DuplicateRequestError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.NotPossibleError,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotPossibleError,
    grpc.StatusCode.OUT_OF_RANGE: errors.RequestError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.ABORTED: errors.RetryableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.CANCELLED: errors.CancelledRequestError,
    grpc.StatusCode.INTERNAL: errors.InternalError,
    grpc.StatusCode.DATA_LOSS: errors.InternalError,
    grpc.StatusCode.UNKNOWN: errors.InternalError,
}


def error_from_status(
    code: grpc.StatusCode, message: str | None, trailing_metadata: Iterable[tuple[str, str | bytes]] | None
) -> errors.HotgraphError:
    """The error that a failed call's status stands for. Details that cannot be read count as absent."""
    info, violations, retry_after_seconds, resource, request_id = None, [], None, None, ""
    for detail in _details(trailing_metadata):
        match detail:
            case error_details_pb2.ErrorInfo():
                info = detail if detail.domain == DOMAIN else info
            case error_details_pb2.BadRequest():
                violations += [errors.Violation(v.field, v.description) for v in detail.field_violations]
            case error_details_pb2.RetryInfo():
                retry_after_seconds = max(detail.retry_delay.ToTimedelta().total_seconds(), 0.0)
            case error_details_pb2.ResourceInfo():
                resource = errors.Resource(detail.resource_type, detail.resource_name)
            case error_details_pb2.RequestInfo():
                request_id = detail.request_id
    reason = "" if info is None else info.reason
    error_type = ERROR_BY_REASON.get(reason) or ERROR_BY_CODE.get(code, errors.HotgraphError)
    return error_type(
        message or code.name,
        code=code,
        reason=reason,
        metadata=None if info is None else dict(info.metadata),
        violations=violations,
        retry_after_seconds=retry_after_seconds,
        resource=resource,
        request_id=request_id,
    )


def error_from_call(error: grpc.RpcError) -> errors.HotgraphError:
    """The error that gRPC's own exception stands for, of either kind of channel. The call must have ended."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return errors.InternalError(f"gRPC raised {type(error).__name__}")
    # None of these has an annotation that holds for both kinds of channel.
    code, details, metadata = error.code(), error.details(), error.trailing_metadata()
    return error_from_status(code, details, [(key, value) for key, value in metadata or ()])


_DETAIL_TYPES = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.ResourceInfo,
    error_details_pb2.RequestInfo,
)


def _details(trailing_metadata: Iterable[tuple[str, str | bytes]] | None) -> list[Message]:
    """The details of a kind we read. None at all when a byte of them is wrong: the code alone must then do."""
    packed = next((value for key, value in trailing_metadata or () if key == DETAILS_KEY), b"")
    found: list[Message] = []
    try:
        status = status_pb2.Status.FromString(packed if isinstance(packed, bytes) else packed.encode())
        for any_message in status.details:
            for detail_type in _DETAIL_TYPES:
                detail = detail_type()
                if any_message.Unpack(detail):
                    found.append(detail)
    except DecodeError:
        return []
    return found
