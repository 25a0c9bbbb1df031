"""The table of statuses: every error of a call is in it, and its details say what the contract promises."""

from __future__ import annotations

import inspect
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # its stubs come without py.typed
from hypothesis import given
from hypothesis import strategies as st

from hotgraph.v1 import error_reason_pb2
from hotgraph_server import errors
from hotgraph_server.errors import GraphNotReadyError, HotgraphError, RetryableError, Violation
from hotgraph_server.rpc.status import CODES, DETAILS_KEY, MAX_VIOLATIONS, PUSHBACK_KEY, code_of, status_of

ENDS_THE_PROCESS = {errors.SettingsError, errors.ModelLoadError, errors.AddressInUseError}
ABSTRACT = {HotgraphError, errors.RequestError, errors.NotFoundError, RetryableError}
CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, HotgraphError) and kind not in ABSTRACT | ENDS_THE_PROCESS
]
CONTEXT = errors.ContextLengthError(limit=10, prompt_tokens=4, max_tokens=9)


def example(kind: type[HotgraphError]) -> HotgraphError:
    """An error of this class."""
    if kind is errors.InvalidRequestError:
        return errors.InvalidRequestError([Violation("a.b", "is odd")])
    if kind is errors.ContextLengthError:
        return CONTEXT
    if kind is errors.MessageTooLargeError:
        return errors.MessageTooLargeError(limit_bytes=10, size_bytes=11)
    if issubclass(kind, RetryableError):
        return kind("later", retry_after_seconds=1.25)
    return kind("what happened")


def details_of(error: HotgraphError, **options: Any) -> dict[str, Any]:
    status = status_of(error, **options)
    packed = status_pb2.Status.FromString(dict(status.trailing_metadata)[DETAILS_KEY])
    assert (packed.code, packed.message) == (status.code.value[0], status.message)
    found = {}
    for detail in packed.details:
        message = getattr(error_details_pb2, detail.type_url.rpartition(".")[2])()
        assert detail.Unpack(message)
        found[type(message).__name__] = message
    return found


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_a_code_and_a_reason_of_the_contract(kind: type[HotgraphError]) -> None:
    """Each class is in the table itself, and its reason is a name of ErrorReason."""
    assert kind in CODES
    assert f"ERROR_REASON_{kind.reason}" in error_reason_pb2.ErrorReason.keys()  # noqa: SIM118 (an enum wrapper)
    info = details_of(example(kind))["ErrorInfo"]
    assert (info.reason, info.domain) == (kind.reason, "hotgraph")


def test_every_reason_of_the_contract_has_an_error() -> None:
    """Nothing of ErrorReason is without a class, but the unspecified one."""
    reasons = {f"ERROR_REASON_{kind.reason}" for kind in CLASSES}
    assert reasons == set(error_reason_pb2.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}


def test_codes_are_those_the_contract_names() -> None:
    """The comment on each reason starts with its code; the table agrees with those that clients decide by."""
    assert code_of(example(errors.QueueFullError)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert code_of(example(errors.LoadingError)) is grpc.StatusCode.UNAVAILABLE
    assert code_of(example(errors.ServerTimeLimitError)) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert code_of(example(errors.EventsGoneError)) is grpc.StatusCode.OUT_OF_RANGE


@pytest.mark.parametrize("kind", ENDS_THE_PROCESS)
def test_errors_that_end_the_process_have_no_status(kind: type[HotgraphError]) -> None:
    """No client may see them."""
    assert code_of(kind("path of something")) is None
    with pytest.raises(KeyError):
        status_of(kind("path of something"))


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if issubclass(kind, RetryableError)])
def test_retryable_errors_say_when_in_both_ways(kind: type[RetryableError]) -> None:
    """RetryInfo for people's code, the pushback trailer for gRPC's own retry policy, rounded up."""
    error = kind("later", retry_after_seconds=1.2501)
    assert details_of(error)["RetryInfo"].retry_delay.ToMilliseconds() == 1250
    pushback = dict(status_of(error).trailing_metadata)[PUSHBACK_KEY]
    # Who requires graphs asked to fail fast: gRPC must not wait for them in its place.
    assert pushback == ("-1" if kind is GraphNotReadyError else "1251")


def test_no_other_error_invites_a_retry() -> None:
    """The trailer is only there for what a retry may cure."""
    for kind in CLASSES:
        if not issubclass(kind, RetryableError):
            assert "RetryInfo" not in details_of(example(kind))
            assert PUSHBACK_KEY not in dict(status_of(example(kind)).trailing_metadata)


def test_every_invalid_argument_names_a_field() -> None:
    """Whatever the reason, a caller looks in BadRequest."""
    for kind, code in CODES.items():
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            assert details_of(example(kind))["BadRequest"].field_violations


@pytest.mark.parametrize(("prompt_tokens", "field"), [(4, "max_tokens"), (10, "prompt"), (11, "prompt")])
def test_context_error_blames_the_right_field(prompt_tokens: int, field: str) -> None:
    """When the prompt alone fills the context, it is the prompt's fault."""
    error = errors.ContextLengthError(limit=10, prompt_tokens=prompt_tokens, max_tokens=9)
    assert [v.field for v in details_of(error)["BadRequest"].field_violations] == [field]


def test_missing_things_are_named() -> None:
    """ResourceInfo has the type and the name asked for."""
    info = details_of(errors.GraphNotFoundError("graphs/x"))["ResourceInfo"]
    assert (info.resource_type, info.resource_name) == ("hotgraph.v1.Graph", "graphs/x")


def test_request_is_named_when_there_is_one() -> None:
    """RequestInfo carries the id."""
    assert details_of(example(errors.DrainingError), request_id="r-1")["RequestInfo"].request_id == "r-1"
    assert "RequestInfo" not in details_of(example(errors.DrainingError))


@given(
    name=st.text(max_size=5000),
    fields=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=200),
)
def test_trailers_stay_below_what_clients_take(name: str, fields: list[str]) -> None:
    """However large what was sent, the whole of the trailers stays below 8 KiB."""
    for error in (
        errors.ModelNotFoundError(name),
        errors.InvalidRequestError([Violation(field, "must be at most 4 of these, or none") for field in fields]),
    ):
        status = status_of(error, request_id="r" * 128)
        packed = dict(status.trailing_metadata)[DETAILS_KEY]
        percent_encoded = sum(1 if 0x20 <= byte <= 0x7E else 3 for byte in status.message.encode())
        assert len(packed) * 4 / 3 + percent_encoded < 8000


def test_violations_are_cut_not_lost_in_silence() -> None:
    """The first ones are told."""
    error = errors.InvalidRequestError([Violation(f"f{n}", "odd") for n in range(100)])
    fields = [v.field for v in details_of(error)["BadRequest"].field_violations]
    assert fields == [f"f{n}" for n in range(MAX_VIOLATIONS)]
