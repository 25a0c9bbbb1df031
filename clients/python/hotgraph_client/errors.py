"""The errors a caller sees, named as the server's own and for what the caller can do. How they are made is in `status.py`.

HotgraphError
  RequestError            fix the request: InvalidRequestError, ContextLengthError, ModelNotFoundError, ...
  RetryableError          come back later, or go elsewhere: QueueFullError, LoadingError, DrainingError, ...
    UnavailableError      no server answered; StreamLostError: the server was lost in the middle of an answer
  DeadlineError           the time is over
  CancelledRequestError   the caller cancelled
  ResourceExhaustedError  refused by the transport or a proxy, such as a message over the size limit
  InternalError           tell us, with `incident`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import grpc

if TYPE_CHECKING:
    from hotgraph_client.types import Choice, Started


@dataclass(frozen=True, slots=True)
class Violation:
    """One wrong field of a request: its path as in the contract, and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Resource:
    """The thing an error is about: its type as in the contract, such as hotgraph.v1.Model, and its name."""

    type: str
    name: str


class HotgraphError(Exception):
    """The root of all errors of a call.

    code: the gRPC status. reason: a name of the contract's ErrorReason, empty when the status did not come from the
    daemon itself (a proxy's, or gRPC's own). metadata: the numbers behind the message, as text. violations: every wrong
    field. retry_after_seconds: when to come back, if told. resource: what was not found. request_id: as the server knows it.
    """

    status_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after_seconds: float | None = None,
        resource: Resource | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.status_code if code is None else code
        self.reason = reason
        self.metadata: dict[str, str] = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds
        self.resource = resource
        self.request_id = request_id

    @property
    def incident(self) -> str:
        """What finds an internal error in the server's log; else empty."""
        return self.metadata.get("incident", "")


# Fix the request.


class RequestError(HotgraphError):
    """The request cannot be served as it is; sending it again changes nothing."""


class InvalidRequestError(RequestError):
    """Fields are wrong; `violations` names every one of them."""

    status_code = grpc.StatusCode.INVALID_ARGUMENT


class MalformedMessageError(RequestError):
    """The bytes were no message of the method's type: client and server do not speak the same contract."""

    status_code = grpc.StatusCode.INVALID_ARGUMENT


class MessageTooLargeError(RequestError):
    """The request's message is over the server's limit. `metadata`: limit_bytes, size_bytes."""

    status_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class ContextLengthError(RequestError):
    """Prompt and completion do not fit into the context together. `metadata`: limit, prompt_tokens, max_tokens."""

    status_code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(RequestError):
    """The named thing is not here; `resource` says which."""

    status_code = grpc.StatusCode.NOT_FOUND


class ModelNotFoundError(NotFoundError):
    """This daemon does not serve the named model."""


class GraphNotFoundError(NotFoundError):
    """The graph cache has no entry of this name."""


class ServiceNotFoundError(NotFoundError):
    """Health knows no service of this name."""


class DuplicateRequestError(RequestError):
    """A request with this id is in flight."""

    status_code = grpc.StatusCode.ALREADY_EXISTS


class NotPossibleError(RequestError):
    """This daemon cannot do it as it is set up, or the thing is not in the right state."""

    status_code = grpc.StatusCode.FAILED_PRECONDITION


class EventsGoneError(RequestError):
    """The events asked for are no longer kept."""

    status_code = grpc.StatusCode.OUT_OF_RANGE


class UnauthenticatedError(RequestError):
    """No credential, or a wrong one."""

    status_code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(RequestError):
    """The credential does not allow this call."""

    status_code = grpc.StatusCode.PERMISSION_DENIED


# Come back later, or go elsewhere.


class RetryableError(HotgraphError):
    """The same request may succeed later, here or elsewhere; not before `retry_after_seconds`, if told."""

    status_code = grpc.StatusCode.UNAVAILABLE


class QueueFullError(RetryableError):
    """Too much waits already."""

    status_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class GraphNotReadyError(RetryableError):
    """The graphs that the request requires are not captured yet."""


class LoadingError(RetryableError):
    """The model is being loaded."""


class DrainingError(RetryableError):
    """The daemon is stopping."""


class EngineFailedError(RetryableError):
    """The engine failed; the process ends and is started again by its supervisor."""


class UnavailableError(RetryableError):
    """No server answered, or the connection broke before an answer."""


class StreamLostError(UnavailableError):
    """The server was lost in the middle of an answer, and going on elsewhere was off, not possible or in vain.

    `started` and `choices` are what came until then; `code` is how the connection told it, which depends on what stands
    between client and server.
    """

    started: Started | None = None
    choices: tuple[Choice, ...] = ()


# Out of time, or gone.


class DeadlineError(HotgraphError):
    """The request's timeout or the call's deadline passed."""

    status_code = grpc.StatusCode.DEADLINE_EXCEEDED


class ServerTimeLimitError(DeadlineError):
    """The server's limit for one request passed."""


class CancelledRequestError(HotgraphError):
    """The caller cancelled."""

    status_code = grpc.StatusCode.CANCELLED


# Neither the request's fault nor the daemon's word.


class ResourceExhaustedError(HotgraphError):
    """Refused by the transport or a proxy: a message or metadata over the limit, or too many calls at once."""

    status_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class InternalError(HotgraphError):
    """A mistake of the server's or the connection's. `incident` finds the details in the server's log, when it told one."""

    status_code = grpc.StatusCode.INTERNAL
