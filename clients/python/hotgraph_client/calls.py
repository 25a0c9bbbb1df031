"""Every unary and watching call: its path, its request from Python arguments, and how its answer is read.

Both clients send what is made here, so that they cannot differ. It opens no connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from hotgraph.v1 import admin_service_pb2 as admin
from hotgraph.v1 import graph_pb2
from hotgraph.v1 import graph_service_pb2 as graphs
from hotgraph.v1 import inference_service_pb2 as inference
from hotgraph_client import admin_types, decode, graph_types, types
from hotgraph_client.requests import FieldChecker, GenerationSpec, chat_prompt, is_conversation, optional_duration

MessageT = TypeVar("MessageT", bound=Message)
T = TypeVar("T")

GENERATE_PATH = "/hotgraph.v1.InferenceService/Generate"

MAX_PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Call(Generic[MessageT, T]):
    """One call to make: what to send where, and how to read what comes (the answer, or each message of a watch)."""

    path: str
    request: Message
    response_type: type[MessageT]
    decode: Callable[[MessageT], T]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list, and the token of the next one; empty on the last."""

    items: tuple[T, ...]
    next_page_token: str


# InferenceService.


def complete(spec: GenerationSpec) -> Call[inference.CompleteResponse, types.Completion]:
    path = "/hotgraph.v1.InferenceService/Complete"
    return Call(path, spec.complete_request(), inference.CompleteResponse, decode.completion)


def tokenize(
    prompt: str | Sequence[types.MessageLike], model: str, add_special_tokens: bool | None
) -> Call[inference.TokenizeResponse, types.Tokenized]:
    check = FieldChecker()
    request = inference.TokenizeRequest(model=check.text("model", model), add_special_tokens=add_special_tokens)
    if isinstance(prompt, str):
        request.text = check.text("text", prompt)
    elif is_conversation(prompt):
        request.chat.CopyFrom(chat_prompt(prompt, check))
    else:
        raise TypeError("tokenize takes text or a conversation")
    check.raise_if_any()
    path = "/hotgraph.v1.InferenceService/Tokenize"
    return Call(path, request, inference.TokenizeResponse, decode.tokenized)


def detokenize(
    token_ids: Iterable[int], model: str, skip_special_tokens: bool | None
) -> Call[inference.DetokenizeResponse, str]:
    check = FieldChecker()
    request = inference.DetokenizeRequest(
        model=check.text("model", model),
        token_ids=check.unsigned_list("token_ids", token_ids),
        skip_special_tokens=skip_special_tokens,
    )
    check.raise_if_any()
    path = "/hotgraph.v1.InferenceService/Detokenize"
    return Call(path, request, inference.DetokenizeResponse, lambda response: response.text)


def list_models(page_token: str) -> Call[inference.ListModelsResponse, Page[types.Model]]:
    return Call(
        "/hotgraph.v1.InferenceService/ListModels",
        inference.ListModelsRequest(page_token=page_token),
        inference.ListModelsResponse,
        lambda response: Page(tuple(map(decode.model, response.models)), response.next_page_token),
    )


def get_model(name: str) -> Call[inference.GetModelResponse, types.Model]:
    return Call(
        "/hotgraph.v1.InferenceService/GetModel",
        inference.GetModelRequest(name=name),
        inference.GetModelResponse,
        lambda response: decode.model(response.model),
    )


# GraphService.


def _graph_key(key: graph_types.GraphKey, check: FieldChecker, field: str) -> graph_pb2.GraphKey:
    return graph_pb2.GraphKey(
        tokens=check.unsigned(f"{field}.tokens", key.tokens),
        rows=check.unsigned(f"{field}.rows", key.rows),
        sampler=graph_pb2.SamplerVariant.Value(f"SAMPLER_VARIANT_{graph_types.SamplerVariant(key.sampler).name}"),
    )


def list_graphs(
    states: Iterable[graph_types.GraphState | str], page_token: str
) -> Call[graphs.ListGraphsResponse, Page[graph_types.Graph]]:
    numbers = [graph_pb2.GraphState.Value(f"GRAPH_STATE_{graph_types.GraphState(state).name}") for state in states]
    return Call(
        "/hotgraph.v1.GraphService/ListGraphs",
        graphs.ListGraphsRequest(page_size=MAX_PAGE_SIZE, page_token=page_token, states=numbers),
        graphs.ListGraphsResponse,
        lambda response: Page(tuple(map(decode.graph, response.graphs)), response.next_page_token),
    )


def get_graph(name: str) -> Call[graphs.GetGraphResponse, graph_types.Graph]:
    return Call(
        "/hotgraph.v1.GraphService/GetGraph",
        graphs.GetGraphRequest(name=name),
        graphs.GetGraphResponse,
        lambda response: decode.graph(response.graph),
    )


def prewarm_graphs(
    keys: Iterable[graph_types.GraphKey], wait_seconds: float | None
) -> Call[graphs.PrewarmGraphsResponse, tuple[graph_types.Graph, ...]]:
    check = FieldChecker()
    messages = [_graph_key(key, check, f"keys[{i}]") for i, key in enumerate(keys)]
    check.raise_if_any()
    return Call(
        "/hotgraph.v1.GraphService/PrewarmGraphs",
        graphs.PrewarmGraphsRequest(keys=messages, wait=optional_duration(wait_seconds)),
        graphs.PrewarmGraphsResponse,
        lambda response: tuple(map(decode.graph, response.graphs)),
    )


def pin_graph(name: str, lease_seconds: float | None) -> Call[graphs.PinGraphResponse, graph_types.Graph]:
    return Call(
        "/hotgraph.v1.GraphService/PinGraph",
        graphs.PinGraphRequest(name=name, lease=optional_duration(lease_seconds)),
        graphs.PinGraphResponse,
        lambda response: decode.graph(response.graph),
    )


def unpin_graph(name: str) -> Call[graphs.UnpinGraphResponse, graph_types.Graph]:
    return Call(
        "/hotgraph.v1.GraphService/UnpinGraph",
        graphs.UnpinGraphRequest(name=name),
        graphs.UnpinGraphResponse,
        lambda response: decode.graph(response.graph),
    )


def evict_graph(name: str) -> Call[graphs.EvictGraphResponse, graph_types.Graph]:
    return Call(
        "/hotgraph.v1.GraphService/EvictGraph",
        graphs.EvictGraphRequest(name=name),
        graphs.EvictGraphResponse,
        lambda response: decode.graph(response.graph),
    )


def get_budget() -> Call[graphs.GetBudgetResponse, graph_types.Budget]:
    return Call(
        "/hotgraph.v1.GraphService/GetBudget",
        graphs.GetBudgetRequest(),
        graphs.GetBudgetResponse,
        lambda response: decode.budget(response.budget),
    )


def update_budget(
    limit_bytes: int | None, stall_budget_seconds: float | None
) -> Call[graphs.UpdateBudgetResponse, graph_types.BudgetUpdate]:
    check = FieldChecker()
    paths = []
    if limit_bytes is not None:
        paths.append("limit_bytes")
    if stall_budget_seconds is not None:
        paths.append("stall_budget_per_second")
    request = graphs.UpdateBudgetRequest(
        budget=graph_pb2.Budget(
            limit_bytes=check.unsigned("budget.limit_bytes", limit_bytes or 0, num_bits=64),
            stall_budget_per_second=optional_duration(stall_budget_seconds),
        ),
        update_mask=FieldMask(paths=paths),
    )
    check.raise_if_any()
    return Call(
        "/hotgraph.v1.GraphService/UpdateBudget",
        request,
        graphs.UpdateBudgetResponse,
        lambda response: graph_types.BudgetUpdate(decode.budget(response.budget), tuple(response.evicted_graphs)),
    )


def watch_graphs(after_sequence: int | None) -> Call[graphs.WatchGraphsResponse, graph_types.GraphEvent]:
    check = FieldChecker()
    request = graphs.WatchGraphsRequest(
        after_sequence=check.optional_unsigned("after_sequence", after_sequence, num_bits=64)
    )
    check.raise_if_any()
    return Call(
        "/hotgraph.v1.GraphService/WatchGraphs",
        request,
        graphs.WatchGraphsResponse,
        lambda response: decode.graph_event(response.event),
    )


def export_profile(max_entries: int | None) -> Call[graphs.ExportProfileResponse, graph_types.GraphProfile]:
    check = FieldChecker()
    request = graphs.ExportProfileRequest(max_entries=check.unsigned("max_entries", max_entries or 0))
    check.raise_if_any()
    return Call(
        "/hotgraph.v1.GraphService/ExportProfile",
        request,
        graphs.ExportProfileResponse,
        lambda response: decode.profile(response.profile),
    )


def import_profile(
    profile: graph_types.GraphProfile,
) -> Call[graphs.ImportProfileResponse, graph_types.ProfileImport]:
    check = FieldChecker()
    message = graph_pb2.GraphProfile(model=check.text("profile.model", profile.model))
    if profile.create_time is not None:
        time = Timestamp()
        time.FromDatetime(profile.create_time)
        message.create_time.CopyFrom(time)
    for i, entry in enumerate(profile.entries):
        field = f"profile.entries[{i}]"
        message.entries.add(
            key=_graph_key(entry.key, check, f"{field}.key"),
            num_hits=check.unsigned(f"{field}.num_hits", entry.num_hits, num_bits=64),
            num_misses=check.unsigned(f"{field}.num_misses", entry.num_misses, num_bits=64),
            saved_per_step=optional_duration(entry.saved_per_step_seconds) or Duration(),
            size_bytes=check.unsigned(f"{field}.size_bytes", entry.size_bytes, num_bits=64),
        )
    check.raise_if_any()
    return Call(
        "/hotgraph.v1.GraphService/ImportProfile",
        graphs.ImportProfileRequest(profile=message),
        graphs.ImportProfileResponse,
        lambda response: graph_types.ProfileImport(response.num_queued, response.num_skipped),
    )


# AdminService.


def get_status() -> Call[admin.GetStatusResponse, admin_types.ServerStatus]:
    path = "/hotgraph.v1.AdminService/GetStatus"
    return Call(path, admin.GetStatusRequest(), admin.GetStatusResponse, decode.server_status)


def drain(grace_seconds: float | None) -> Call[admin.DrainResponse, admin_types.DrainStatus]:
    request = admin.DrainRequest(grace=optional_duration(grace_seconds))
    return Call("/hotgraph.v1.AdminService/Drain", request, admin.DrainResponse, decode.drain_status)


def list_clients(page_token: str) -> Call[admin.ListClientsResponse, Page[admin_types.ClientInfo]]:
    return Call(
        "/hotgraph.v1.AdminService/ListClients",
        admin.ListClientsRequest(page_size=MAX_PAGE_SIZE, page_token=page_token),
        admin.ListClientsResponse,
        lambda response: Page(tuple(map(decode.client_info, response.clients)), response.next_page_token),
    )


# grpc.health.v1. Its two messages have one field, number 1: a string, and an enum. The well-known wrappers are the same on
# the wire, so that the client needs no package of stubs for them.

_HEALTH = {0: admin_types.Health.UNKNOWN, 1: admin_types.Health.SERVING, 2: admin_types.Health.NOT_SERVING}
_HEALTH[3] = admin_types.Health.SERVICE_UNKNOWN


def check_health(service: str) -> Call[Int32Value, admin_types.Health]:
    return _health("/grpc.health.v1.Health/Check", service)


def watch_health(service: str) -> Call[Int32Value, admin_types.Health]:
    return _health("/grpc.health.v1.Health/Watch", service)


def _health(path: str, service: str) -> Call[Int32Value, admin_types.Health]:
    request = StringValue(value=service)
    return Call(path, request, Int32Value, lambda message: _HEALTH.get(message.value, admin_types.Health.UNKNOWN))
