"""What must be refused: wrong generations by field, and wrong calls of the other kinds. `test_errors` sends them all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from hotgraph.v1 import admin_service_pb2, generation_pb2, graph_pb2, graph_service_pb2, inference_service_pb2
from hotgraph.v1.generation_pb2 import (
    ChatMessage,
    ChatPrompt,
    GraphPolicy,
    LogitBias,
    OutputOptions,
    ResumedChoice,
    SamplingParams,
    StopConditions,
    TokenIds,
)
from hotgraph_server.config import BOUNDS

CODE = grpc.StatusCode
VOCABULARY = 258
CONTEXT = 1024


@dataclass(frozen=True)
class Row:
    """A generation request that must be refused: `fields` of it are named."""

    name: str
    request: dict[str, Any]
    fields: list[str] = field(default_factory=list)
    code: grpc.StatusCode = CODE.INVALID_ARGUMENT
    reason: str = "INVALID_REQUEST"


def just_above(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(math.inf)))


def just_below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(-math.inf)))


def wrong_number(name: str, value: float) -> Row:
    fields: dict[str, Any] = {name: value}
    return Row(f"{name}={value!r}", {"text": "x", "sampling": SamplingParams(**fields)}, [f"sampling.{name}"])


NOT_FINITE = (math.nan, math.inf, -math.inf)
SAMPLING_ROWS = [
    wrong_number(name, value)
    for name, values in {
        "temperature": (-1.0, -0.5, 1e-45, just_below(0.01), just_above(2.0), *NOT_FINITE),
        "top_p": (0.0, -0.1, just_above(1.0), *NOT_FINITE),
        "min_p": (-0.1, just_below(0.0), just_above(1.0), *NOT_FINITE),
        "repetition_penalty": (0.0, -1.0, just_above(10.0), *NOT_FINITE),
        "presence_penalty": (just_below(-2.0), just_above(2.0), *NOT_FINITE),
        "frequency_penalty": (just_below(-2.0), just_above(2.0), *NOT_FINITE),
    }.items()
    for value in values
]


def bias(*entries: tuple[int, float]) -> SamplingParams:
    return SamplingParams(logit_bias=[LogitBias(token_id=token_id, bias=value) for token_id, value in entries])


def chat(*turns: tuple[int, str]) -> ChatPrompt:
    return ChatPrompt(messages=[ChatMessage(role=role, content=content) for role, content in turns])  # type: ignore[arg-type]


USER = generation_pb2.CHAT_ROLE_USER
GREEDY = graph_pb2.SAMPLER_VARIANT_GREEDY

PROMPT_ROWS = [
    Row("no prompt", {}, ["prompt"]),
    Row("empty text", {"text": ""}, ["text"]),
    Row("no token ids", {"token_ids": TokenIds()}, ["token_ids.ids"]),
    Row("token id at the vocabulary's size", {"token_ids": TokenIds(ids=[1, VOCABULARY, 2])}, ["token_ids.ids[1]"]),
    Row(
        "two token ids outside",
        {"token_ids": TokenIds(ids=[VOCABULARY, 0, 4294967295])},
        ["token_ids.ids[0]", "token_ids.ids[2]"],
    ),
    Row("no messages", {"chat": ChatPrompt()}, ["chat.messages"]),
    Row("message without a role", {"chat": chat((USER, "a"), (0, "b"))}, ["chat.messages[1].role"]),
    Row("message with an unknown role", {"chat": chat((77, "a"))}, ["chat.messages[0].role"]),
    Row("too many messages", {"chat": chat(*[(USER, "")] * (BOUNDS.max_messages + 1))}, ["chat.messages"]),
    Row("too long text", {"text": "x" * (BOUNDS.max_prompt_bytes + 1)}, ["text"]),
    Row("too long chat", {"chat": chat(*[(USER, "x" * (BOUNDS.max_prompt_bytes // 2 + 1))] * 2)}, ["chat.messages"]),
]

OTHER_ROWS = [
    Row("too long request id", {"text": "x", "request_id": "r" * 129}, ["request_id"]),
    Row("odd request id", {"text": "x", "request_id": "a b"}, ["request_id"]),
    Row("request id with a line end", {"text": "x", "request_id": "a\n"}, ["request_id"]),
    Row("too long session key", {"text": "x", "session_key": "ä" * 65}, ["session_key"]),
    Row("max_tokens 0", {"text": "x", "max_tokens": 0}, ["max_tokens"]),
    Row("num_choices 0", {"text": "x", "num_choices": 0}, ["num_choices"]),
    Row("too many choices", {"text": "x", "num_choices": 17}, ["num_choices"]),
    Row(
        "biased token outside", {"text": "x", "sampling": bias((VOCABULARY, 1.0))}, ["sampling.logit_bias[0].token_id"]
    ),
    Row("biased twice", {"text": "x", "sampling": bias((5, 1.0), (5, 2.0))}, ["sampling.logit_bias[1].token_id"]),
    Row("NaN bias", {"text": "x", "sampling": bias((5, 0.0), (6, math.nan))}, ["sampling.logit_bias[1].bias"]),
    Row("too large bias", {"text": "x", "sampling": bias((5, just_above(100.0)))}, ["sampling.logit_bias[0].bias"]),
    Row("too many biases", {"text": "x", "sampling": bias(*[(1, 0.0)] * 513)}, ["sampling.logit_bias"]),
    Row("too many stops", {"text": "x", "stop": StopConditions(strings=["a"] * 17)}, ["stop.strings"]),
    Row("empty stop", {"text": "x", "stop": StopConditions(strings=["a", "b", ""])}, ["stop.strings[2]"]),
    Row("too long stop", {"text": "x", "stop": StopConditions(strings=["é" * 129])}, ["stop.strings[0]"]),
    Row("too many stop ids", {"text": "x", "stop": StopConditions(token_ids=[1] * 65)}, ["stop.token_ids"]),
    Row("stop id outside", {"text": "x", "stop": StopConditions(token_ids=[1, 999])}, ["stop.token_ids[1]"]),
    Row(
        "min_tokens above max_tokens",
        {"text": "x", "max_tokens": 4, "stop": StopConditions(min_tokens=5)},
        ["stop.min_tokens"],
    ),
    Row("min_tokens above the default", {"text": "x", "stop": StopConditions(min_tokens=300)}, ["stop.min_tokens"]),
    Row("min_tokens above the context", {"text": "x", "stop": StopConditions(min_tokens=CONTEXT)}, ["stop.min_tokens"]),
    Row("too many logprobs", {"text": "x", "output": OutputOptions(logprobs=21)}, ["output.logprobs"]),
    Row("unknown graph mode", {"text": "x", "graph_policy": GraphPolicy(mode=9)}, ["graph_policy.mode"]),  # type: ignore[arg-type]
    Row(
        "wait for graphs without a time",
        {"text": "x", "graph_policy": GraphPolicy(mode=generation_pb2.GRAPH_MODE_WAIT_UP_TO)},
        ["graph_policy.max_wait"],
    ),
    Row(
        "wait for graphs too long",
        {
            "text": "x",
            "graph_policy": GraphPolicy(
                mode=generation_pb2.GRAPH_MODE_WAIT_UP_TO, max_wait=Duration(seconds=60, nanos=1)
            ),
        },
        ["graph_policy.max_wait"],
    ),
    Row("timeout 0", {"text": "x", "timeout": Duration()}, ["timeout"]),
    Row("negative timeout", {"text": "x", "timeout": Duration(seconds=-1)}, ["timeout"]),
    Row("too long timeout", {"text": "x", "timeout": Duration(seconds=86400, nanos=1)}, ["timeout"]),
    Row("timeout of two signs", {"text": "x", "timeout": Duration(seconds=1, nanos=-1)}, ["timeout"]),
    Row("timeout with too many nanos", {"text": "x", "timeout": Duration(nanos=2_000_000_000)}, ["timeout"]),
    Row(
        "resumed choice outside",
        {"text": "x", "sampling": SamplingParams(seed=1), "resume": [ResumedChoice(index=1)]},
        ["resume[0].index"],
    ),
    Row(
        "resumed twice",
        {"text": "x", "sampling": SamplingParams(seed=1), "resume": [ResumedChoice()] * 2},
        ["resume[1].index"],
    ),
    Row(
        "resumed token outside",
        {"text": "x", "sampling": SamplingParams(seed=1), "resume": [ResumedChoice(token_ids=[1, 300])]},
        ["resume[0].token_ids[1]"],
    ),
    Row(
        "resumed more than max_tokens",
        {"text": "x", "max_tokens": 1, "sampling": SamplingParams(seed=1), "resume": [ResumedChoice(token_ids=[1, 2])]},
        ["resume[0].token_ids"],
    ),
    Row("resumed without the seed", {"text": "x", "resume": [ResumedChoice(token_ids=[1])]}, ["sampling.seed"]),
    Row(
        "everything at once",
        {"max_tokens": 0, "num_choices": 0, "sampling": SamplingParams(top_p=0, temperature=math.nan)},
        ["max_tokens", "num_choices", "prompt", "sampling.temperature", "sampling.top_p"],
    ),
    Row("unknown model", {"text": "x", "model": "gpt-5"}, code=CODE.NOT_FOUND, reason="MODEL_NOT_FOUND"),
    Row("a path as a model", {"text": "x", "model": "../../etc/passwd"}, code=CODE.NOT_FOUND, reason="MODEL_NOT_FOUND"),
]

CONTEXT_ROWS = [
    Row("max_tokens beyond the context", {"text": "x", "max_tokens": CONTEXT}, ["max_tokens"], reason="CONTEXT_LENGTH"),
    Row(
        "max_tokens beyond everything", {"text": "x", "max_tokens": 2**32 - 1}, ["max_tokens"], reason="CONTEXT_LENGTH"
    ),
    Row("text beyond the context", {"text": "x" * CONTEXT}, ["prompt"], reason="CONTEXT_LENGTH"),
    Row("long text beyond the context", {"text": "x" * 100_000}, ["prompt"], reason="CONTEXT_LENGTH"),
    Row("ids beyond the context", {"token_ids": TokenIds(ids=[1] * CONTEXT)}, ["prompt"], reason="CONTEXT_LENGTH"),
    Row("many wrong ids", {"token_ids": TokenIds(ids=[9999] * 200_000)}, ["prompt"], reason="CONTEXT_LENGTH"),
]

ROWS = PROMPT_ROWS + SAMPLING_ROWS + OTHER_ROWS + CONTEXT_ROWS

OTHER_CALLS: list[
    tuple[str, str, Any, grpc.StatusCode, str, list[str]]
] = [  # service, method, request, code, reason, fields
    (
        "inference",
        "Tokenize",
        inference_service_pb2.TokenizeRequest(),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["input"],
    ),
    (
        "inference",
        "Tokenize",
        inference_service_pb2.TokenizeRequest(text="x" * (2 << 20) + "x"),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["text"],
    ),
    (
        "inference",
        "Tokenize",
        inference_service_pb2.TokenizeRequest(text="x", model="y"),
        CODE.NOT_FOUND,
        "MODEL_NOT_FOUND",
        [],
    ),
    (
        "inference",
        "Detokenize",
        inference_service_pb2.DetokenizeRequest(token_ids=[5, 258]),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["token_ids[1]"],
    ),
    (
        "inference",
        "Detokenize",
        inference_service_pb2.DetokenizeRequest(token_ids=[5] * 1025),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["token_ids"],
    ),
    (
        "inference",
        "ListModels",
        inference_service_pb2.ListModelsRequest(page_size=-1),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["page_size"],
    ),
    (
        "inference",
        "ListModels",
        inference_service_pb2.ListModelsRequest(page_token="x"),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["page_token"],
    ),
    (
        "graphs",
        "ListGraphs",
        graph_service_pb2.ListGraphsRequest(page_size=-5),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["page_size"],
    ),
    (
        "graphs",
        "ListGraphs",
        graph_service_pb2.ListGraphsRequest(page_token="%%%"),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["page_token"],
    ),
    (
        "graphs",
        "ListGraphs",
        graph_service_pb2.ListGraphsRequest(states=[graph_pb2.GRAPH_STATE_UNSPECIFIED]),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["states[0]"],
    ),
    ("graphs", "GetGraph", graph_service_pb2.GetGraphRequest(), CODE.INVALID_ARGUMENT, "INVALID_REQUEST", ["name"]),
    (
        "graphs",
        "GetGraph",
        graph_service_pb2.GetGraphRequest(name="t1-r1-greedy"),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["name"],
    ),
    (
        "graphs",
        "GetGraph",
        graph_service_pb2.GetGraphRequest(name="graphs/none"),
        CODE.NOT_FOUND,
        "GRAPH_NOT_FOUND",
        [],
    ),
    (
        "graphs",
        "PinGraph",
        graph_service_pb2.PinGraphRequest(name="graphs/none"),
        CODE.NOT_FOUND,
        "GRAPH_NOT_FOUND",
        [],
    ),
    (
        "graphs",
        "PinGraph",
        graph_service_pb2.PinGraphRequest(name="graphs/none", lease=Duration()),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["lease"],
    ),
    (
        "graphs",
        "UnpinGraph",
        graph_service_pb2.UnpinGraphRequest(name="graphs/none"),
        CODE.NOT_FOUND,
        "GRAPH_NOT_FOUND",
        [],
    ),
    (
        "graphs",
        "EvictGraph",
        graph_service_pb2.EvictGraphRequest(name="graphs/none"),
        CODE.NOT_FOUND,
        "GRAPH_NOT_FOUND",
        [],
    ),
    (
        "graphs",
        "PrewarmGraphs",
        graph_service_pb2.PrewarmGraphsRequest(),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["keys"],
    ),
    (
        "graphs",
        "PrewarmGraphs",
        graph_service_pb2.PrewarmGraphsRequest(
            keys=[graph_pb2.GraphKey(tokens=1, rows=2, sampler=GREEDY), graph_pb2.GraphKey()]
        ),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["keys[0].tokens", "keys[1].rows", "keys[1].sampler", "keys[1].tokens"],
    ),
    (
        "graphs",
        "PrewarmGraphs",
        graph_service_pb2.PrewarmGraphsRequest(keys=[graph_pb2.GraphKey(tokens=1 << 30, rows=1, sampler=GREEDY)]),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["keys[0]"],
    ),
    (
        "graphs",
        "UpdateBudget",
        graph_service_pb2.UpdateBudgetRequest(),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["update_mask"],
    ),
    (
        "graphs",
        "UpdateBudget",
        graph_service_pb2.UpdateBudgetRequest(update_mask=FieldMask(paths=["limit_bytes", "used_bytes"])),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["update_mask.paths[1]"],
    ),
    (
        "graphs",
        "UpdateBudget",
        graph_service_pb2.UpdateBudgetRequest(
            budget=graph_pb2.Budget(stall_budget_per_second=Duration(seconds=2)),
            update_mask=FieldMask(paths=["stall_budget_per_second"]),
        ),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["budget.stall_budget_per_second"],
    ),
    (
        "graphs",
        "ExportProfile",
        graph_service_pb2.ExportProfileRequest(max_entries=1001),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["max_entries"],
    ),
    (
        "graphs",
        "ImportProfile",
        graph_service_pb2.ImportProfileRequest(
            profile=graph_pb2.GraphProfile(model="fake", entries=[graph_pb2.ProfileEntry()])
        ),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["profile.entries[0].key.rows", "profile.entries[0].key.sampler", "profile.entries[0].key.tokens"],
    ),
    (
        "graphs",
        "ImportProfile",
        graph_service_pb2.ImportProfileRequest(profile=graph_pb2.GraphProfile(model="other")),
        CODE.FAILED_PRECONDITION,
        "NOT_POSSIBLE",
        [],
    ),
    (
        "admin",
        "ListClients",
        admin_service_pb2.ListClientsRequest(page_size=-1),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["page_size"],
    ),
    (
        "admin",
        "Drain",
        admin_service_pb2.DrainRequest(grace=Duration(seconds=-1)),
        CODE.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        ["grace"],
    ),
]
