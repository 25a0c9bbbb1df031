"""Every refusal that a client can provoke: the exact code, reason and fields on the wire, and a daemon that serves on."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from hotgraph.v1 import admin_service_pb2, graph_service_pb2, inference_service_pb2
from hotgraph.v1.generation_pb2 import (
    LogitBias,
    SamplingParams,
    TokenIds,
)
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from tests.integration.harness import Serving, WireError, refused, serving, stream_refused
from tests.integration.refusals import CODE, CONTEXT, OTHER_CALLS, ROWS, USER, VOCABULARY, Row, chat


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served() -> AsyncIterator[Serving]:
    async with serving() as daemon:
        yield daemon


pytestmark = pytest.mark.asyncio(loop_scope="module")

seen: list[tuple[str, WireError]] = []  # every error of this module, for the last test


def check(name: str, error: WireError, row: Row) -> None:
    seen.append((name, error))
    assert (error.code, error.reason, error.domain) == (row.code, row.reason, "hotgraph")
    assert error.fields == sorted(row.fields)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_wrong_generation_is_refused_field_by_field(served: Serving, row: Row) -> None:
    """Both kinds of generation refuse it with the same code, reason and fields; the next request is served."""
    stream_error = await stream_refused(served.inference.Generate(GenerateRequest(**row.request)))
    check(row.name, stream_error, row)
    unary_error = await refused(served.inference.Complete(CompleteRequest(**row.request)))
    check(row.name, unary_error, row)
    await served.check_alive()


async def test_context_error_tells_the_numbers(served: Serving) -> None:
    """CONTEXT_LENGTH carries the limit and what was asked for."""
    error = await refused(served.inference.Complete(CompleteRequest(token_ids=TokenIds(ids=[1] * 30), max_tokens=1000)))
    assert error.metadata == {"limit": "1024", "prompt_tokens": "30", "max_tokens": "1000"}


GOOD_BOUNDS = [
    SamplingParams(temperature=0.01),
    SamplingParams(temperature=0.0, top_p=1.0, min_p=0.0, repetition_penalty=10.0),
    SamplingParams(temperature=-0.0),
    SamplingParams(temperature=2.0, top_p=1e-7, min_p=1.0, repetition_penalty=1e-7),
    SamplingParams(presence_penalty=-2.0, frequency_penalty=2.0, top_k=2**32 - 1, seed=2**64 - 1),
    SamplingParams(logit_bias=[LogitBias(token_id=i % VOCABULARY, bias=-100) for i in range(VOCABULARY - 1)]),
    SamplingParams(top_k=0, seed=0),
]


@pytest.mark.parametrize("sampling", GOOD_BOUNDS, ids=range(len(GOOD_BOUNDS)))
async def test_values_at_the_bounds_are_served(served: Serving, sampling: SamplingParams) -> None:
    """A bound itself belongs to the range, as the contract says it."""
    response = await served.inference.Complete(CompleteRequest(text="x", max_tokens=2, sampling=sampling))
    assert len(response.choices[0].token_ids) == 2
    if sampling.HasField("seed"):
        assert response.seed == sampling.seed


async def test_longest_prompt_that_fits_is_served(served: Serving) -> None:
    """Prompt and completion may fill the context to the last token."""
    ids = TokenIds(ids=[7] * (CONTEXT - 1))
    response = await served.inference.Complete(CompleteRequest(token_ids=ids))
    assert len(response.choices[0].token_ids) == 1


Method = Callable[[bytes], Any]


def raw(served: Serving, method: str) -> Method:
    """A unary call that sends bytes as they are."""
    return served.channel.unary_unary(f"/hotgraph.v1.{method}", request_serializer=bytes, response_deserializer=bytes)


MALFORMED = {
    "truncated": b"\x1a\x82",
    "no UTF-8": b"\x1a\x02\xff\xfe",
    "wild wire type": b"\xff\xff\xff\xff",
    "length beyond the end": b"\x32\x7f\x00",
}


@pytest.mark.parametrize("method", ["Complete", "Tokenize", "Detokenize", "ListModels", "GetModel"])
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_message_is_the_callers_fault(served: Serving, method: str, data: bytes) -> None:
    """Bytes that are no message are INVALID_ARGUMENT with a reason, and tell nothing of our inside."""
    if method in ("Detokenize", "ListModels", "GetModel") and data == MALFORMED["no UTF-8"]:
        data = b"\x0a\x02\xff\xfe" if method != "ListModels" else b"\x12\x02\xff\xfe"
    error = await refused(raw(served, f"InferenceService/{method}")(data))
    check(f"malformed {method}", error, Row("", {}, ["(message)"], reason="MALFORMED_MESSAGE"))
    await served.check_alive()


async def test_malformed_stream_request_is_refused_likewise(served: Serving) -> None:
    """A streaming call answers a malformed message as a unary one does."""
    call = served.channel.unary_stream(
        "/hotgraph.v1.InferenceService/Generate", request_serializer=bytes, response_deserializer=bytes
    )
    error = await stream_refused(call(b"\x1a\x02\xff\xfe"))
    assert (error.code, error.reason) == (CODE.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


@pytest.mark.parametrize("method", ["Complete", "Generate", "Tokenize"])
async def test_two_prompt_kinds_on_the_wire_are_refused(served: Serving, method: str) -> None:
    """A message that sets two members of the oneof is refused, whichever the parser would have kept."""
    kind = getattr(inference_service_pb2, f"{method}Request")
    data = kind(text="one").SerializeToString() + kind(chat=chat((USER, "two"))).SerializeToString()
    name = f"/hotgraph.v1.InferenceService/{method}"
    if method == "Generate":
        stream = served.channel.unary_stream(name, request_serializer=bytes, response_deserializer=bytes)
        error = await stream_refused(stream(data))
    else:
        error = await refused(raw(served, f"InferenceService/{method}")(data))
    check("two prompts", error, Row("", {}, ["input" if method == "Tokenize" else "prompt"]))
    await served.check_alive()


async def test_unknown_fields_are_ignored(served: Serving) -> None:
    """A newer caller's field does not hurt: field 999 of the request is skipped."""
    data = CompleteRequest(text="x", max_tokens=2).SerializeToString() + b"\xba\x3e\x03abc"
    response = inference_service_pb2.CompleteResponse.FromString(await raw(served, "InferenceService/Complete")(data))
    assert len(response.choices[0].token_ids) == 2


LIMIT = 4 << 20  # max_message_bytes by default


@pytest.mark.parametrize("size", [LIMIT + 1, 5 << 20, 15 << 20])
async def test_message_over_the_limit_is_refused(served: Serving, size: int) -> None:
    """More than max_message_bytes is RESOURCE_EXHAUSTED with both numbers, streamed or not; the connection lives on."""
    text = "x" * (size - 5)  # a tag and four bytes of length come before
    row = Row("", {}, [], code=CODE.RESOURCE_EXHAUSTED, reason="MESSAGE_TOO_LARGE")
    assert CompleteRequest(text=text).ByteSize() == size
    for error in (
        await refused(served.inference.Complete(CompleteRequest(text=text))),
        await stream_refused(served.inference.Generate(GenerateRequest(text=text))),
    ):
        check("message over the limit", error, row)
        assert error.metadata == {"limit_bytes": str(LIMIT), "size_bytes": str(size)}
    await served.check_alive()


async def test_message_of_the_limit_is_looked_at(served: Serving) -> None:
    """A message of exactly max_message_bytes is read: what is wrong with it is its content."""
    error = await refused(served.inference.Complete(CompleteRequest(text="x" * (LIMIT - 5))))
    assert error.code is CODE.INVALID_ARGUMENT
    await served.check_alive()


async def test_message_far_over_the_limit_is_refused_by_the_library(served: Serving) -> None:
    """What is four times too large is refused before it is in memory: RESOURCE_EXHAUSTED, and the connection lives on."""
    error = await refused(served.inference.Complete(CompleteRequest(text="x" * (17 << 20))))
    assert error.code is CODE.RESOURCE_EXHAUSTED
    seen.append(("message far over the limit", error))
    await served.check_alive()


async def test_compressed_bomb_is_refused_after_decompression(served: Serving) -> None:
    """A small message that unpacks to more than the limit is refused too."""
    call = served.inference.Complete(CompleteRequest(text="x" * (64 << 20)), compression=grpc.Compression.Gzip)
    assert (await refused(call)).code is CODE.RESOURCE_EXHAUSTED
    await served.check_alive()


async def test_metadata_over_the_hard_limit_is_refused(served: Serving) -> None:
    """Headers beyond 16 KiB end the call, not the connection."""
    call = served.inference.Complete(CompleteRequest(text="x"), metadata=(("x-much", "y" * 17_000),))
    assert (await refused(call)).code is CODE.RESOURCE_EXHAUSTED
    await served.check_alive()


@pytest.mark.parametrize("name", ["/hotgraph.v1.InferenceService/Nothing", "/nobody.v1.Service/Call"])
async def test_unknown_method_is_unimplemented(served: Serving, name: str) -> None:
    """What is not served is UNIMPLEMENTED, with the library's constant text."""
    call = served.channel.unary_unary(name, request_serializer=bytes, response_deserializer=bytes)
    error = await refused(call(b""))
    seen.append((name, error))
    assert (error.code, error.message) == (CODE.UNIMPLEMENTED, "Method not found!")


async def test_request_id_comes_back_with_the_error(served: Serving) -> None:
    """RequestInfo carries the caller's id, or one that the server made."""
    error = await refused(served.inference.Complete(CompleteRequest(request_id="mine:1")))
    assert error.request_id == "mine:1"
    error = await refused(served.inference.Complete(CompleteRequest()))
    assert re.fullmatch(r"[0-9a-f]{32}", error.request_id)


async def test_unusable_request_id_is_not_echoed(served: Serving) -> None:
    """A huge id does not come back in trailers that the client could not take."""
    error = await refused(served.inference.Complete(CompleteRequest(text="x", request_id="r" * 1_000_000)))
    assert (error.fields, error.request_id) == (["request_id"], "")


async def test_unknown_model_names_the_resource(served: Serving) -> None:
    """ResourceInfo says which model was asked for, shortened when it is absurd."""
    error = await refused(served.inference.GetModel(inference_service_pb2.GetModelRequest(name="models/other")))
    assert (error.code, error.reason) == (CODE.NOT_FOUND, "MODEL_NOT_FOUND")
    assert error.resource == ("hotgraph.v1.Model", "models/other")
    error = await refused(served.inference.GetModel(inference_service_pb2.GetModelRequest(name="ö" * 100_000)))
    assert error.resource is not None
    assert len(error.resource[1].encode()) <= 128


async def test_odd_client_id_is_refused(served: Serving) -> None:
    """The declared id of a caller follows the same rules on every call."""
    call = served.admin.GetStatus(admin_service_pb2.GetStatusRequest(), metadata=(("x-client-id", "a b"),))
    error = await refused(call)
    assert (error.code, error.fields) == (CODE.INVALID_ARGUMENT, ["x-client-id"])


@pytest.mark.parametrize("case", OTHER_CALLS, ids=lambda case: f"{case[1]}-{'-'.join(case[5]) or case[4]}")
async def test_other_wrong_calls_are_refused(
    served: Serving, case: tuple[str, str, Any, grpc.StatusCode, str, list[str]]
) -> None:
    """Each call refuses what its messages may not hold, with the field's path."""
    service, method, request, code, reason, fields = case
    error = await refused(getattr(getattr(served, service), method)(request))
    check(method, error, Row("", {}, fields, code=code, reason=reason))
    await served.check_alive()


async def test_watch_from_the_future_is_out_of_range(served: Serving) -> None:
    """Events that never were are gone: OUT_OF_RANGE, EVENTS_GONE."""
    request = graph_service_pb2.WatchGraphsRequest(after_sequence=1 << 40)
    error = await stream_refused(served.graphs.WatchGraphs(request))
    assert (error.code, error.reason) == (CODE.OUT_OF_RANGE, "EVENTS_GONE")
    assert set(error.metadata) == {"oldest_sequence", "last_sequence"}


LEAKS = re.compile(
    r"(/(usr|home|root|tmp|work|etc|var|opt)/(?!passwd)|\.py\b|Traceback|File \"|<class|object at 0x|0x[0-9a-f]{6,}"
    r"|_pb2|google\.protobuf|\b[A-Z]\w+(Error|Exception)\b|hotgraph_server|graphcache|torch|asyncio|still there)"
)


async def test_no_status_tells_of_our_inside(served: Serving) -> None:
    """No status of this module holds a path, a Python class, a traceback or another caller's text."""
    assert len(seen) >= 2 * len(ROWS)
    for name, error in seen:
        text = " ".join([error.message, *error.metadata.values(), *error.violations.values()])
        assert not LEAKS.search(text), (name, text)
