"""Our errors, named for what the caller can do. It knows no gRPC: `rpc/status.py` holds the table to statuses.

The client has errors of the same names, made from those statuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Violation:
    """One wrong field of a request: its path as in the contract, and what is wrong with it."""

    field: str
    description: str


class HotgraphError(Exception):
    """The root. `reason` is a name of the contract's ErrorReason; `metadata` goes into ErrorInfo."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})


# Fix the request.


class RequestError(HotgraphError):
    """The request cannot be served as it is; sending it again changes nothing."""


class InvalidRequestError(RequestError):
    """Fields are wrong; `violations` names every one of them."""

    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        if not violations:
            raise ValueError("an InvalidRequestError needs at least one violation")
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = tuple(violations)


class MalformedMessageError(RequestError):
    """The bytes are no message of the method's type."""

    reason = "MALFORMED_MESSAGE"


class MessageTooLargeError(RequestError):
    """The request's message is over the size limit."""

    reason = "MESSAGE_TOO_LARGE"

    def __init__(self, *, limit_bytes: int, size_bytes: int) -> None:
        super().__init__(
            f"the message has {size_bytes} bytes, more than the {limit_bytes} that are taken",
            metadata={"limit_bytes": str(limit_bytes), "size_bytes": str(size_bytes)},
        )
        self.limit_bytes = limit_bytes
        self.size_bytes = size_bytes


class ContextLengthError(RequestError):
    """Prompt and completion do not fit into the context together."""

    reason = "CONTEXT_LENGTH"

    def __init__(self, *, limit: int, prompt_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"the context holds {limit} tokens: {prompt_tokens} prompt tokens and max_tokens {max_tokens} do not fit",
            metadata={"limit": str(limit), "prompt_tokens": str(prompt_tokens), "max_tokens": str(max_tokens)},
        )
        self.limit = limit
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens


class NotFoundError(RequestError):
    """The named thing is not here."""

    resource_type: ClassVar[str] = ""

    def __init__(self, name: str) -> None:
        super().__init__(f"no {self.resource_type.rpartition('.')[2].lower()} of this name: {name!r}")
        self.name = name


class ModelNotFoundError(NotFoundError):
    """This daemon does not serve the named model."""

    reason = "MODEL_NOT_FOUND"
    resource_type = "hotgraph.v1.Model"


class GraphNotFoundError(NotFoundError):
    """The graph cache has no entry of this name."""

    reason = "GRAPH_NOT_FOUND"
    resource_type = "hotgraph.v1.Graph"


class ServiceNotFoundError(NotFoundError):
    """Health knows no service of this name."""

    reason = "SERVICE_NOT_FOUND"
    resource_type = "grpc.Service"


class DuplicateRequestError(RequestError):
    """A request with this id is in flight."""

    reason = "DUPLICATE_REQUEST"


class NotPossibleError(RequestError):
    """This daemon cannot do it as it is set up, or the thing is not in the right state."""

    reason = "NOT_POSSIBLE"


class EventsGoneError(RequestError):
    """The events asked for are no longer kept."""

    reason = "EVENTS_GONE"


class UnauthenticatedError(RequestError):
    """No credential, or a wrong one."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(RequestError):
    """The credential does not allow this call."""

    reason = "PERMISSION_DENIED"


# Come back later, or go elsewhere.


class RetryableError(HotgraphError):
    """The same request may succeed later, here or elsewhere."""

    def __init__(self, message: str, *, retry_after_seconds: float, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message, metadata=metadata)
        self.retry_after_seconds = retry_after_seconds


class QueueFullError(RetryableError):
    """Too much waits already."""

    reason = "QUEUE_FULL"


class GraphNotReadyError(RetryableError):
    """The graphs that the request requires are not captured yet."""

    reason = "GRAPH_NOT_READY"


class LoadingError(RetryableError):
    """The model is being loaded."""

    reason = "LOADING"


class DrainingError(RetryableError):
    """The daemon is stopping."""

    reason = "DRAINING"


class EngineFailedError(RetryableError):
    """The engine failed; the process ends and is started again by its supervisor."""

    reason = "ENGINE_FAILED"


# Out of time, or gone.


class DeadlineError(HotgraphError):
    """The request's timeout or the call's deadline passed."""

    reason = "DEADLINE_EXCEEDED"


class ServerTimeLimitError(DeadlineError):
    """The server's limit for one request passed."""

    reason = "SERVER_TIME_LIMIT"


class CancelledRequestError(HotgraphError):
    """The caller left."""

    reason = "CANCELLED"


# Tell us.


class InternalError(HotgraphError):
    """Our mistake. The message is fixed; `incident` finds the details in the log."""

    reason = "INTERNAL"

    def __init__(self, incident: str) -> None:
        super().__init__("internal error", metadata={"incident": incident})
        self.incident = incident


# Raised while starting; these end the process with an exit status, no client sees them.


class SettingsError(HotgraphError):
    """A setting is unknown, malformed or contradicts another."""

    reason = "SETTINGS"


class ModelLoadError(HotgraphError):
    """A model's files are missing, damaged or of a kind that cannot be served."""

    reason = "MODEL_LOAD"


class AddressInUseError(HotgraphError):
    """Another process holds the socket or port."""

    reason = "ADDRESS_IN_USE"
