"""Statuses to errors: every reason of the contract, every detail, and bare codes."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]  # its stubs come without py.typed

import hotgraph_server.errors as server_errors
from hotgraph.v1 import error_reason_pb2
from hotgraph_client import errors
from hotgraph_client.status import DETAILS_KEY, ERROR_BY_CODE, ERROR_BY_REASON, error_from_status
from tests.client.scripted_server import details_metadata, error_info, retry_info

REASONS = [name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()][1:]  # noqa: SIM118  # not a dict


def test_every_reason_has_an_error() -> None:
    """The table holds exactly the reasons of the contract."""
    assert sorted(ERROR_BY_REASON) == sorted(REASONS)


def test_names_are_the_servers() -> None:
    """An error is called the same on both sides, and what the server calls fixable or retryable is so here."""
    for error in vars(server_errors).values():
        is_told = isinstance(error, type) and issubclass(error, server_errors.HotgraphError)
        if not is_told or "reason" not in vars(error) or error.reason not in REASONS:
            continue
        ours = ERROR_BY_REASON[error.reason]
        if error is not server_errors.HotgraphError:
            assert ours.__name__ == error.__name__
        for base in ("RequestError", "RetryableError", "DeadlineError", "NotFoundError"):
            assert issubclass(ours, getattr(errors, base)) is issubclass(error, getattr(server_errors, base))


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_decides(reason: str) -> None:
    """The daemon's reason chooses the error whatever the code, and its metadata comes along."""
    metadata = details_metadata(grpc.StatusCode.UNKNOWN, "told", error_info(reason, incident="i-1"))
    error = error_from_status(grpc.StatusCode.UNKNOWN, "told", metadata)
    assert type(error) is ERROR_BY_REASON[reason]
    assert error.reason == reason
    assert error.metadata == {"incident": "i-1"}
    assert error.incident == "i-1"
    assert error.message == str(error) == "told"


def test_all_details() -> None:
    """Violations, the time to come back, the resource and the request id are read from the details."""
    request = error_details_pb2.BadRequest()
    request.field_violations.add(field="sampling.top_p", description="must be in (0, 1]")
    request.field_violations.add(field="max_tokens", description="must be at least 1")
    metadata = details_metadata(
        grpc.StatusCode.INVALID_ARGUMENT,
        "wrong",
        error_info("INVALID_REQUEST"),
        request,
        retry_info(1.5),
        error_details_pb2.ResourceInfo(resource_type="hotgraph.v1.Model", resource_name="models/x"),
        error_details_pb2.RequestInfo(request_id="r-1"),
        error_details_pb2.Help(),
    )
    error = error_from_status(grpc.StatusCode.INVALID_ARGUMENT, "wrong", metadata)
    assert isinstance(error, errors.InvalidRequestError)
    assert [v.field for v in error.violations] == ["sampling.top_p", "max_tokens"]
    assert error.violations[1].description == "must be at least 1"
    assert error.retry_after_seconds == 1.5
    assert error.resource == errors.Resource("hotgraph.v1.Model", "models/x")
    assert error.request_id == "r-1"
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_bare_codes(code: grpc.StatusCode) -> None:
    """A status without details has an error by its code, no reason, and its code is kept."""
    error = error_from_status(code, None, None)
    assert type(error) is ERROR_BY_CODE[code]
    assert error.code is code
    assert error.reason == ""
    assert error.message == code.name
    assert error.retry_after_seconds is None


def test_another_domain_is_bare() -> None:
    """An ErrorInfo of another domain says nothing to us."""
    info = error_details_pb2.ErrorInfo(reason="LOADING", domain="proxy.example")
    metadata = details_metadata(grpc.StatusCode.UNAVAILABLE, "x", info)
    error = error_from_status(grpc.StatusCode.UNAVAILABLE, "x", metadata)
    assert type(error) is errors.UnavailableError
    assert error.reason == ""


def test_a_new_reason_goes_by_the_code() -> None:
    """A reason that this client does not know is kept, and the code decides."""
    metadata = details_metadata(grpc.StatusCode.UNAVAILABLE, "x", error_info("TOO_HOT"))
    error = error_from_status(grpc.StatusCode.UNAVAILABLE, "x", metadata)
    assert type(error) is errors.UnavailableError
    assert error.reason == "TOO_HOT"


@pytest.mark.parametrize("packed", [b"\xff\xff\xff", b"\x1a\x05\x0a\x03abc", b""])
def test_broken_details_count_as_absent(packed: bytes) -> None:
    """Details that cannot be read leave an error by its code."""
    error = error_from_status(grpc.StatusCode.NOT_FOUND, "x", [(DETAILS_KEY, packed)])
    assert type(error) is errors.NotFoundError
