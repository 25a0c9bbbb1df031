"""Messages of the contract to the dataclasses of this package. The only place that reads response messages."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtobufMessage
from google.protobuf.timestamp_pb2 import Timestamp

from hotgraph.v1 import admin_service_pb2, generation_pb2, graph_pb2, inference_service_pb2, model_pb2
from hotgraph_client import admin_types, graph_types, types

T = TypeVar("T")
E = TypeVar("E", bound=enum.StrEnum)


class _ProtobufEnum(Protocol):
    def Name(self, number: Any, /) -> str: ...  # noqa: N802  # protobuf's name


def enum_member(enum_type: type[E], protobuf_enum: _ProtobufEnum, prefix: str, number: int) -> E:
    """The member of the same name; UNSPECIFIED for a number that this client does not know."""
    try:
        return enum_type[protobuf_enum.Name(number).removeprefix(prefix)]
    except (ValueError, KeyError):
        return enum_type["UNSPECIFIED"]


def seconds(message: Duration) -> float:
    return message.seconds + message.nanos / 1e9


def _optional_seconds(message: ProtobufMessage, field: str) -> float | None:
    return seconds(getattr(message, field)) if message.HasField(field) else None


def _optional_time(message: ProtobufMessage, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    value: Timestamp = getattr(message, field)
    return value.ToDatetime(tzinfo=UTC)


def _same_fields(dataclass_type: Callable[..., T], message: ProtobufMessage, **others: Any) -> T:
    """A dataclass from the message's fields of the same names, and others that need more than copying."""
    names = [field.name for field in fields(dataclass_type) if field.name not in others]  # type: ignore[arg-type]
    return dataclass_type(**{name: getattr(message, name) for name in names}, **others)


# Generation.


def _finish(message: generation_pb2.ChoiceFinish) -> types.ChoiceFinish:
    matched = message.WhichOneof("matched")
    return types.ChoiceFinish(
        choice_index=message.choice_index,
        reason=enum_member(types.FinishReason, generation_pb2.FinishReason, "FINISH_REASON_", message.reason),
        stop_string=message.stop_string if matched == "stop_string" else None,
        stop_token_id=message.stop_token_id if matched == "stop_token_id" else None,
    )


def _logprobs(message: generation_pb2.TokenLogprobs) -> types.TokenLogprobs:
    return types.TokenLogprobs(
        chosen=_same_fields(types.TokenLogprob, message.chosen),
        top=tuple(_same_fields(types.TokenLogprob, one) for one in message.top),
    )


def _timings(message: generation_pb2.Timings) -> types.Timings:
    return types.Timings(
        queue_seconds=seconds(message.queue),
        prefill_seconds=seconds(message.prefill),
        decode_seconds=seconds(message.decode),
        time_to_first_token_seconds=seconds(message.time_to_first_token),
        time_per_output_token_seconds=_optional_seconds(message, "time_per_output_token"),
        total_seconds=seconds(message.total),
    )


def _step_group(message: generation_pb2.StepGroup) -> types.StepGroup:
    return _same_fields(
        types.StepGroup,
        message,
        phase=enum_member(types.StepPhase, generation_pb2.StepPhase, "STEP_PHASE_", message.phase),
        graph_age_seconds=_optional_seconds(message, "graph_age"),
        engine_seconds=seconds(message.engine_time),
    )


def _receipt(message: generation_pb2.Receipt) -> types.Receipt:
    groups = tuple(_step_group(group) for group in message.step_groups)
    return _same_fields(types.Receipt, message, step_groups=groups)


def event(message: inference_service_pb2.GenerateResponse) -> types.Event | None:
    """The event in the message; None for a kind that this client does not know, which is to be passed over."""
    match message.WhichOneof("event"):
        case "started":
            return _same_fields(types.Started, message.started)
        case "tokens":
            tokens = message.tokens
            return types.Tokens(
                choice_index=tokens.choice_index,
                token_ids=tuple(tokens.token_ids),
                text=tokens.text,
                logprobs=tuple(map(_logprobs, tokens.logprobs)) if tokens.logprobs else (),
                finish=_finish(tokens.finish) if tokens.HasField("finish") else None,
            )
        case "finished":
            finished = message.finished
            return types.Finished(
                choices=tuple(map(_finish, finished.choices)),
                usage=_same_fields(types.Usage, finished.usage),
                timings=_timings(finished.timings),
                receipt=_receipt(finished.receipt),
            )
        case _:
            return None


def completion(message: inference_service_pb2.CompleteResponse) -> types.Completion:
    return _same_fields(
        types.Completion,
        message,
        choices=tuple(
            types.Choice(
                index=choice.index,
                text=choice.text,
                token_ids=tuple(choice.token_ids),
                logprobs=tuple(map(_logprobs, choice.logprobs)),
                finish=_finish(choice.finish) if choice.HasField("finish") else None,
            )
            for choice in message.choices
        ),
        usage=_same_fields(types.Usage, message.usage),
        timings=_timings(message.timings),
        receipt=_receipt(message.receipt),
        num_resumes=0,
    )


def tokenized(message: inference_service_pb2.TokenizeResponse) -> types.Tokenized:
    return types.Tokenized(tuple(message.token_ids), tuple(message.pieces), message.context_length)


def model(message: model_pb2.Model) -> types.Model:
    return _same_fields(
        types.Model,
        message,
        runner=enum_member(types.ModelRunner, model_pb2.ModelRunner, "MODEL_RUNNER_", message.runner),
        eos_token_ids=tuple(message.eos_token_ids),
        bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
        limits=_same_fields(
            types.ModelLimits, message.limits, max_request_seconds=seconds(message.limits.max_request_duration)
        ),
        load_time=_optional_time(message, "load_time"),
        load_seconds=seconds(message.load_duration),
    )


# Graphs.


def graph_key(message: graph_pb2.GraphKey) -> graph_types.GraphKey:
    sampler = enum_member(graph_types.SamplerVariant, graph_pb2.SamplerVariant, "SAMPLER_VARIANT_", message.sampler)
    return graph_types.GraphKey(message.tokens, message.rows, sampler)


def _capture_timings(message: graph_pb2.CaptureTimings) -> graph_types.CaptureTimings:
    return graph_types.CaptureTimings(
        queue_seconds=seconds(message.queue),
        record_seconds=seconds(message.record),
        instantiate_seconds=seconds(message.instantiate),
        verify_seconds=seconds(message.verify),
    )


def graph(message: graph_pb2.Graph) -> graph_types.Graph:
    return _same_fields(
        graph_types.Graph,
        message,
        key=graph_key(message.key),
        state=enum_member(graph_types.GraphState, graph_pb2.GraphState, "GRAPH_STATE_", message.state),
        retry_time=_optional_time(message, "retry_time"),
        create_time=_optional_time(message, "create_time"),
        publish_time=_optional_time(message, "publish_time"),
        last_hit_time=_optional_time(message, "last_hit_time"),
        capture=_capture_timings(message.capture) if message.HasField("capture") else None,
        eager_step_seconds=_optional_seconds(message, "eager_step"),
        graph_step_seconds=_optional_seconds(message, "graph_step"),
        segment=enum_member(graph_types.CacheSegment, graph_pb2.CacheSegment, "CACHE_SEGMENT_", message.segment),
        pin_expire_time=_optional_time(message.pin, "expire_time") if message.HasField("pin") else None,
    )


def budget(message: graph_pb2.Budget) -> graph_types.Budget:
    return _same_fields(graph_types.Budget, message, stall_budget_seconds=seconds(message.stall_budget_per_second))


def graph_event(message: graph_pb2.GraphEvent) -> graph_types.GraphEvent:
    return _same_fields(
        graph_types.GraphEvent,
        message,
        event_time=_optional_time(message, "event_time"),
        type=enum_member(graph_types.GraphEventType, graph_pb2.GraphEventType, "GRAPH_EVENT_TYPE_", message.type),
        graph=graph(message.graph) if message.HasField("graph") else None,
    )


def profile(message: graph_pb2.GraphProfile) -> graph_types.GraphProfile:
    entries = tuple(
        _same_fields(
            graph_types.ProfileEntry,
            entry,
            key=graph_key(entry.key),
            saved_per_step_seconds=seconds(entry.saved_per_step),
        )
        for entry in message.entries
    )
    return graph_types.GraphProfile(message.model, _optional_time(message, "create_time"), entries)


# The daemon.


def _daemon_state(number: int) -> admin_types.DaemonState:
    return enum_member(admin_types.DaemonState, admin_service_pb2.DaemonState, "DAEMON_STATE_", number)


def server_status(message: admin_service_pb2.GetStatusResponse) -> admin_types.ServerStatus:
    return _same_fields(
        admin_types.ServerStatus,
        message,
        state=_daemon_state(message.state),
        start_time=_optional_time(message, "start_time"),
        scheduler=_same_fields(admin_types.SchedulerStatus, message.scheduler),
        kv_cache=_same_fields(admin_types.KvCacheStatus, message.kv_cache),
        graph_cache=_same_fields(admin_types.GraphCacheStatus, message.graph_cache),
    )


def drain_status(message: admin_service_pb2.DrainResponse) -> admin_types.DrainStatus:
    return admin_types.DrainStatus(
        _daemon_state(message.state), message.num_requests, _optional_time(message, "deadline")
    )


def client_info(message: admin_service_pb2.Client) -> admin_types.ClientInfo:
    return _same_fields(
        admin_types.ClientInfo,
        message,
        first_seen_time=_optional_time(message, "first_seen_time"),
        last_seen_time=_optional_time(message, "last_seen_time"),
    )
