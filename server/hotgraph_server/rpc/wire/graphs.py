"""The graph cache on the wire: keys, entries, events, the budget and profiles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from graphcache import BudgetInfo, Event, EventType, GraphInfo, GraphState, Profile, ProfileEntry, Segment
from hotgraph.v1 import graph_pb2
from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.rpc.wire.common import from_duration, to_duration, to_timestamp

SAMPLERS: Final = {
    Sampler.GREEDY: graph_pb2.SAMPLER_VARIANT_GREEDY,
    Sampler.GUMBEL: graph_pb2.SAMPLER_VARIANT_GUMBEL,
    Sampler.FILTERED: graph_pb2.SAMPLER_VARIANT_FILTERED,
}
SAMPLERS_IN: Final = {value: sampler for sampler, value in SAMPLERS.items()}
STATES: Final = {
    GraphState.QUEUED: graph_pb2.GRAPH_STATE_QUEUED,
    GraphState.CAPTURING: graph_pb2.GRAPH_STATE_CAPTURING,
    GraphState.READY: graph_pb2.GRAPH_STATE_READY,
    GraphState.EVICTED: graph_pb2.GRAPH_STATE_EVICTED,
    GraphState.FAILED: graph_pb2.GRAPH_STATE_FAILED,
    GraphState.QUARANTINED: graph_pb2.GRAPH_STATE_QUARANTINED,
}
STATES_IN: Final[dict[int, GraphState]] = {value: state for state, value in STATES.items()}
SEGMENTS: Final = {
    None: graph_pb2.CACHE_SEGMENT_UNSPECIFIED,
    Segment.PROBATION: graph_pb2.CACHE_SEGMENT_PROBATION,
    Segment.PROTECTED: graph_pb2.CACHE_SEGMENT_PROTECTED,
}
EVENT_TYPES: Final = {
    EventType.PLANNED: graph_pb2.GRAPH_EVENT_TYPE_PLANNED,
    EventType.CAPTURED: graph_pb2.GRAPH_EVENT_TYPE_CAPTURED,
    EventType.VERIFIED: graph_pb2.GRAPH_EVENT_TYPE_VERIFIED,
    EventType.PUBLISHED: graph_pb2.GRAPH_EVENT_TYPE_PUBLISHED,
    EventType.EVICTED: graph_pb2.GRAPH_EVENT_TYPE_EVICTED,
    EventType.FAILED: graph_pb2.GRAPH_EVENT_TYPE_FAILED,
    EventType.QUARANTINED: graph_pb2.GRAPH_EVENT_TYPE_QUARANTINED,
    EventType.PINNED: graph_pb2.GRAPH_EVENT_TYPE_PINNED,
    EventType.UNPINNED: graph_pb2.GRAPH_EVENT_TYPE_UNPINNED,
    EventType.BUDGET_UPDATED: graph_pb2.GRAPH_EVENT_TYPE_BUDGET_UPDATED,
    EventType.PROFILE_IMPORTED: graph_pb2.GRAPH_EVENT_TYPE_PROFILE_IMPORTED,
    EventType.STATISTICS: graph_pb2.GRAPH_EVENT_TYPE_STATISTICS,
}


def graph_name(cache_name: str) -> str:
    """The resource name of the cache's name."""
    return f"graphs/{cache_name}"


def step_key(message: graph_pb2.GraphKey) -> StepKey:
    """Of a key that was checked."""
    return StepKey(message.tokens, message.rows, SAMPLERS_IN[message.sampler])


def graph_states(states: Iterable[int]) -> tuple[GraphState, ...]:
    """Of states that were checked."""
    return tuple(STATES_IN[state] for state in states)


def _key_message(key: StepKey) -> graph_pb2.GraphKey:
    return graph_pb2.GraphKey(tokens=key.tokens, rows=key.rows, sampler=SAMPLERS[key.sampler])


def graph_message(info: GraphInfo[StepKey]) -> graph_pb2.Graph:
    """Times that are None stay absent."""
    message = graph_pb2.Graph(
        name=graph_name(info.name),
        key=_key_message(info.key),
        state=STATES[info.state],
        size_bytes=info.size_bytes,
        num_hits=info.num_hits,
        num_misses=info.num_misses,
        num_failures=info.num_failures,
        failure=info.failure,
        create_time=to_timestamp(info.create_time),
        segment=SEGMENTS[info.segment],
    )
    if info.retry_time is not None:
        message.retry_time.CopyFrom(to_timestamp(info.retry_time))
    if info.publish_time is not None:
        message.publish_time.CopyFrom(to_timestamp(info.publish_time))
    if info.last_hit_time is not None:
        message.last_hit_time.CopyFrom(to_timestamp(info.last_hit_time))
    if info.capture is not None:
        message.capture.CopyFrom(
            graph_pb2.CaptureTimings(
                queue=to_duration(info.capture.queue_seconds),
                record=to_duration(info.capture.record_seconds),
                instantiate=to_duration(info.capture.instantiate_seconds),
                verify=to_duration(info.capture.verify_seconds),
            )
        )
    if info.eager_seconds is not None:
        message.eager_step.CopyFrom(to_duration(info.eager_seconds))
    if info.graph_seconds is not None:
        message.graph_step.CopyFrom(to_duration(info.graph_seconds))
    if info.pin_expire_time is not None:
        message.pin.expire_time.CopyFrom(to_timestamp(info.pin_expire_time))
    return message


def event_message(event: Event[StepKey]) -> graph_pb2.GraphEvent:
    return graph_pb2.GraphEvent(
        sequence=event.sequence,
        event_time=to_timestamp(event.time),
        type=EVENT_TYPES[event.type],
        graph=None if event.graph is None else graph_message(event.graph),
        detail=event.detail,
    )


def budget_message(budget: BudgetInfo) -> graph_pb2.Budget:
    return graph_pb2.Budget(
        limit_bytes=budget.limit_bytes,
        used_bytes=budget.used_bytes,
        pinned_bytes=budget.pinned_bytes,
        kv_cache_bytes=budget.kv_cache_bytes,
        num_graphs=budget.num_graphs,
        stall_budget_per_second=to_duration(budget.stall_budget_seconds),
    )


def profile_message(profile: Profile[StepKey], *, model_id: str, create_time: float) -> graph_pb2.GraphProfile:
    return graph_pb2.GraphProfile(
        model=model_id,
        create_time=to_timestamp(create_time),
        entries=[
            graph_pb2.ProfileEntry(
                key=_key_message(entry.key),
                num_hits=entry.num_hits,
                num_misses=entry.num_misses,
                saved_per_step=to_duration(entry.saved_seconds),
                size_bytes=entry.size_bytes,
            )
            for entry in profile.entries
        ],
    )


def profile_from(message: graph_pb2.GraphProfile) -> Profile[StepKey]:
    """Of a profile that was checked."""
    return Profile(
        entries=tuple(
            ProfileEntry(
                key=step_key(entry.key),
                num_hits=entry.num_hits,
                num_misses=entry.num_misses,
                saved_seconds=from_duration(entry.saved_per_step),
                size_bytes=entry.size_bytes,
            )
            for entry in message.entries
        )
    )
