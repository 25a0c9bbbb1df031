"""Messages to dataclasses: every enum value, presence, durations and times."""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from typing import Any

import pytest

from hotgraph.v1 import admin_service_pb2, generation_pb2, graph_pb2, model_pb2
from hotgraph.v1.inference_service_pb2 import CompleteResponse, GenerateResponse
from hotgraph_client import admin_types, decode, graph_types, types

ENUMS = [
    (types.Role, generation_pb2.ChatRole, "CHAT_ROLE_"),
    (types.GraphMode, generation_pb2.GraphMode, "GRAPH_MODE_"),
    (types.FinishReason, generation_pb2.FinishReason, "FINISH_REASON_"),
    (types.StepPhase, generation_pb2.StepPhase, "STEP_PHASE_"),
    (types.ModelRunner, model_pb2.ModelRunner, "MODEL_RUNNER_"),
    (graph_types.SamplerVariant, graph_pb2.SamplerVariant, "SAMPLER_VARIANT_"),
    (graph_types.GraphState, graph_pb2.GraphState, "GRAPH_STATE_"),
    (graph_types.CacheSegment, graph_pb2.CacheSegment, "CACHE_SEGMENT_"),
    (graph_types.GraphEventType, graph_pb2.GraphEventType, "GRAPH_EVENT_TYPE_"),
    (admin_types.DaemonState, admin_service_pb2.DaemonState, "DAEMON_STATE_"),
]


@pytest.mark.parametrize(("ours", "theirs", "prefix"), ENUMS)
def test_enums_are_the_contracts(ours: type[enum.StrEnum], theirs: Any, prefix: str) -> None:
    """Each enum has exactly the contract's values, under the same names; an unknown number reads as UNSPECIFIED."""
    assert [member.name for member in ours] == [name.removeprefix(prefix) for name in theirs.keys()]  # noqa: SIM118  # not a dict
    for name, number in theirs.items():
        assert decode.enum_member(ours, theirs, prefix, number).name == name.removeprefix(prefix)
    assert decode.enum_member(ours, theirs, prefix, 999).name == "UNSPECIFIED"


def test_tokens() -> None:
    """A Tokens event carries ids, text, log-probabilities with their bytes, and what ended the choice."""
    message = GenerateResponse()
    message.tokens.choice_index = 2
    message.tokens.token_ids.extend([7, 8])
    message.tokens.text = "ab"
    position = message.tokens.logprobs.add()
    position.chosen.token_id, position.chosen.logprob, position.chosen.piece = 7, -0.5, b"a"
    position.top.add(token_id=9, logprob=-0.25, piece=b"\xff")
    message.tokens.finish.choice_index = 2
    message.tokens.finish.reason = generation_pb2.FINISH_REASON_STOP
    message.tokens.finish.stop_token_id = 0
    event = decode.event(message)
    assert event == types.Tokens(
        choice_index=2,
        token_ids=(7, 8),
        text="ab",
        logprobs=(
            types.TokenLogprobs(types.TokenLogprob(7, -0.5, b"a"), top=(types.TokenLogprob(9, -0.25, b"\xff"),)),
        ),
        finish=types.ChoiceFinish(2, types.FinishReason.STOP, stop_token_id=0),
    )


def test_finished() -> None:
    """Finished carries ends, usage, timings in seconds and the receipt; what is absent is None."""
    message = GenerateResponse()
    finished = message.finished
    finished.choices.add(reason=generation_pb2.FINISH_REASON_STOP, stop_string="x")
    finished.usage.completion_tokens = 3
    finished.timings.queue.FromMilliseconds(1500)
    finished.receipt.num_steps = 4
    finished.receipt.step_groups.add(phase=generation_pb2.STEP_PHASE_DECODE, graph="graphs/a", num_steps=4)
    finished.receipt.step_groups[0].graph_age.FromSeconds(9)
    finished.receipt.step_groups.add(phase=generation_pb2.STEP_PHASE_PREFILL)
    event = decode.event(message)
    assert isinstance(event, types.Finished)
    assert event.choices == (types.ChoiceFinish(0, types.FinishReason.STOP, stop_string="x"),)
    assert event.usage.completion_tokens == 3
    assert event.timings.queue_seconds == 1.5
    assert event.timings.time_per_output_token_seconds is None
    assert not event.timings.is_measured_by_client
    graph, eager = event.receipt.step_groups
    assert (graph.graph, graph.graph_age_seconds, graph.phase) == ("graphs/a", 9.0, types.StepPhase.DECODE)
    assert eager.graph_age_seconds is None


def test_completion() -> None:
    """A whole answer has its choices, and shortcuts to the first."""
    message = CompleteResponse(request_id="r", model="m", seed=5)
    message.choices.add(index=0, text="ab", token_ids=[1, 2]).finish.reason = generation_pb2.FINISH_REASON_LENGTH
    completion = decode.completion(message)
    assert (completion.text, completion.token_ids, completion.seed) == ("ab", (1, 2), 5)
    assert completion.finish_reason is types.FinishReason.LENGTH


def test_graph() -> None:
    """A graph has times in UTC and seconds where they are told, None where they are not."""
    message = graph_pb2.Graph(name="graphs/a", state=graph_pb2.GRAPH_STATE_READY, num_hits=3)
    message.key.tokens, message.key.rows, message.key.sampler = 8, 4, graph_pb2.SAMPLER_VARIANT_GREEDY
    message.publish_time.FromSeconds(1_000_000_000)
    message.capture.record.FromMilliseconds(7)
    message.eager_step.FromMilliseconds(20)
    message.pin.expire_time.FromSeconds(1_000_000_060)
    graph = decode.graph(message)
    assert graph.key == graph_types.GraphKey(8, 4, graph_types.SamplerVariant.GREEDY)
    assert graph.publish_time == datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC)
    assert graph.pin_expire_time == datetime(2001, 9, 9, 1, 47, 40, tzinfo=UTC)
    assert graph.capture is not None
    assert graph.capture.record_seconds == 0.007
    assert (graph.eager_step_seconds, graph.graph_step_seconds, graph.retry_time) == (0.02, None, None)
    assert decode.graph(graph_pb2.Graph()).capture is None


def test_model() -> None:
    """A model tells its limits and, when it has one, its beginning-of-text token, zero included."""
    message = model_pb2.Model(id="m", bos_token_id=0, runner=model_pb2.MODEL_RUNNER_DECODER)
    message.limits.max_request_duration.FromSeconds(600)
    message.load_duration.FromMilliseconds(2500)
    model = decode.model(message)
    assert (model.bos_token_id, model.load_seconds, model.limits.max_request_seconds) == (0, 2.5, 600.0)
    assert decode.model(model_pb2.Model()).bos_token_id is None


def test_event_without_graph() -> None:
    """An event about no graph has none."""
    message = graph_pb2.GraphEvent(sequence=4, type=graph_pb2.GRAPH_EVENT_TYPE_BUDGET_UPDATED)
    event = decode.graph_event(message)
    assert event == graph_types.GraphEvent(4, None, graph_types.GraphEventType.BUDGET_UPDATED, None, "")


def test_status() -> None:
    """The daemon's status is copied section by section."""
    message = admin_service_pb2.GetStatusResponse(version="1", state=admin_service_pb2.DAEMON_STATE_SERVING)
    message.scheduler.num_slots = 64
    message.kv_cache.num_blocks = 10
    message.graph_cache.backend = "eager"
    status = decode.server_status(message)
    assert status.state is admin_types.DaemonState.SERVING
    assert (status.scheduler.num_slots, status.kv_cache.num_blocks, status.graph_cache.backend) == (64, 10, "eager")
