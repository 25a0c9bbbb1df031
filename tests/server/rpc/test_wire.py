"""Messages and our types say the same, in both directions and for every member of each enumeration."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from graphcache import EventType, GraphState, Segment
from hotgraph.v1 import admin_service_pb2, generation_pb2, graph_pb2, inference_service_pb2
from hotgraph_server.batch import Phase, Sampler, StepKey
from hotgraph_server.request import FinishReason, GraphMode, Request, SamplingParams
from hotgraph_server.rpc import DaemonState
from hotgraph_server.rpc.wire import generation, graphs, status
from hotgraph_server.rpc.wire.common import from_duration, to_duration, to_timestamp


@given(st.floats(min_value=-1e9, max_value=1e9))
def test_durations_round_trip_to_the_nanosecond(seconds: float) -> None:
    """What goes out comes in again, and both parts have one sign."""
    duration = to_duration(seconds)
    assert from_duration(duration) == pytest.approx(seconds, abs=1e-9, rel=1e-15)
    assert abs(duration.nanos) < 1_000_000_000
    assert duration.seconds * duration.nanos >= 0


def test_rounding_carries_into_the_seconds() -> None:
    """Almost a second is one."""
    assert to_duration(0.9999999999) == Duration(seconds=1)
    assert to_duration(-0.9999999999) == Duration(seconds=-1)
    assert to_timestamp(1.9999999999).seconds == 2


def request_of(**fields: object) -> Request:
    message = inference_service_pb2.GenerateRequest(request_id="r", text="x", **fields)  # type: ignore[arg-type]
    return generation.request_from(
        message,
        prompt_token_ids=[1, 2],
        max_tokens=7,
        vocabulary_size=100,
        deadline=generation.Deadline(5.0, is_server_limit=True),
        client="unix:#me",
    )


def test_absent_means_the_default() -> None:
    """A bare message is a request of defaults, but for the seed, which is drawn anew each time."""
    request = request_of()
    assert request == Request(
        request_id="r",
        prompt_token_ids=(1, 2),
        max_tokens=7,
        sampling=SamplingParams(seed=request.sampling.seed),
        deadline=5.0,
        is_server_deadline=True,
        client="unix:#me",
    )
    assert request_of().sampling.seed != request.sampling.seed


def test_zero_means_zero() -> None:
    """An explicit zero or false is not the default."""
    request = request_of(
        sampling=generation_pb2.SamplingParams(temperature=0, seed=0, top_k=0),
        output=generation_pb2.OutputOptions(logprobs=0, skip_special_tokens=False),
    )
    assert request.sampling.is_greedy
    assert request.sampling.seed == 0
    assert request.num_logprobs == 0
    assert not request.skip_special_tokens


def test_minus_zero_is_greedy_zero() -> None:
    """A temperature of -0.0 does not reach a division."""
    temperature = request_of(sampling=generation_pb2.SamplingParams(temperature=-0.0)).sampling.temperature
    assert str(temperature) == "0.0"


@pytest.mark.parametrize(("top_k", "expected"), [(0, 0), (1, 1), (99, 99), (100, 0), (2**32 - 1, 0)])
def test_top_k_of_everything_is_no_filter(top_k: int, expected: int) -> None:
    """As many as there are tokens are all."""
    assert request_of(sampling=generation_pb2.SamplingParams(top_k=top_k)).sampling.top_k == expected


def test_everything_set_arrives() -> None:
    """Each field of the message is read."""
    request = request_of(
        sampling=generation_pb2.SamplingParams(
            temperature=0.5,
            top_k=3,
            top_p=0.25,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=2,
            logit_bias=[generation_pb2.LogitBias(token_id=4, bias=-100)],
            seed=2**64 - 1,
        ),
        stop=generation_pb2.StopConditions(
            strings=["a", "b"], token_ids=[5, 5], include_in_text=True, ignore_eos=True, min_tokens=2
        ),
        output=generation_pb2.OutputOptions(logprobs=3, omit_text=True),
        num_choices=2,
        graph_policy=generation_pb2.GraphPolicy(
            mode=generation_pb2.GRAPH_MODE_WAIT_UP_TO, max_wait=Duration(nanos=500_000_000)
        ),
        session_key="s",
        resume=[generation_pb2.ResumedChoice(index=1, token_ids=[8, 9])],
    )
    assert request.sampling == SamplingParams(0.5, 3, 0.25, 0.125, 1.5, -1.0, 2.0, {4: -100.0}, 2**64 - 1)
    assert (request.stop.strings, request.stop.token_ids) == (("a", "b"), frozenset({5}))
    assert (request.stop.include_in_text, request.stop.ignore_eos, request.stop.min_tokens) == (True, True, 2)
    assert (request.num_logprobs, request.omit_text, request.num_choices) == (3, True, 2)
    assert (request.graph_policy.mode, request.graph_policy.max_wait_seconds) == (GraphMode.WAIT_UP_TO, 0.5)
    assert (request.session_key, dict(request.resume)) == ("s", {1: (8, 9)})


def test_every_enumeration_is_complete() -> None:
    """No member of ours or of the contract is forgotten, but what is never sent."""
    assert set(generation.ROLES) == set(generation_pb2.ChatRole.values()) - {0}
    assert set(generation.GRAPH_MODES) == set(generation_pb2.GraphMode.values())
    assert set(generation.GRAPH_MODES.values()) == set(GraphMode)
    assert set(generation.FINISH_REASONS) == {FinishReason.STOP, FinishReason.LENGTH}
    assert set(generation.FINISH_REASONS.values()) == set(generation_pb2.FinishReason.values()) - {0}
    assert set(generation.STEP_PHASES) == {phase.value for phase in Phase}
    assert set(generation.STEP_PHASES.values()) == set(generation_pb2.StepPhase.values()) - {0}
    assert set(graphs.SAMPLERS) == set(Sampler)
    assert set(graphs.SAMPLERS_IN) == set(graph_pb2.SamplerVariant.values()) - {0}
    assert set(graphs.STATES) == set(GraphState)
    assert set(graphs.STATES_IN) == set(graph_pb2.GraphState.values()) - {0}
    assert set(graphs.SEGMENTS) == {None, *Segment}
    assert set(graphs.EVENT_TYPES) == set(EventType)
    assert set(graphs.EVENT_TYPES.values()) == set(graph_pb2.GraphEventType.values()) - {0}
    assert set(status.STATES) == set(DaemonState)
    assert set(status.STATES.values()) == set(admin_service_pb2.DaemonState.values()) - {0}


@given(
    rows=st.integers(1, 64),
    extra=st.integers(0, 500),
    sampler=st.sampled_from(Sampler),
    saved_seconds=st.floats(-1, 1),
    num_hits=st.integers(0, 2**63),
)
def test_profiles_round_trip(rows: int, extra: int, sampler: Sampler, saved_seconds: float, num_hits: int) -> None:
    """A profile is the same after the wire, times to the nanosecond."""
    message = graph_pb2.GraphProfile(
        model="m",
        entries=[
            graph_pb2.ProfileEntry(
                key=graph_pb2.GraphKey(tokens=rows + extra, rows=rows, sampler=graphs.SAMPLERS[sampler]),
                num_hits=num_hits,
                num_misses=3,
                saved_per_step=to_duration(saved_seconds),
                size_bytes=9,
            )
        ],
    )
    profile = graphs.profile_from(message)
    assert profile.entries[0].key == StepKey(rows + extra, rows, sampler)
    back = graphs.profile_message(profile, model_id="m", create_time=0.0)
    assert back.entries == message.entries
