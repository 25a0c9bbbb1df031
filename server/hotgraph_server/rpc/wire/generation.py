"""Generation on the wire: the request in, the events and the receipt out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from hotgraph.v1 import generation_pb2, inference_service_pb2
from hotgraph_server.request import (
    ChoiceFinish,
    FinishedEvent,
    FinishReason,
    GraphMode,
    GraphPolicy,
    Receipt,
    Request,
    SamplingParams,
    StepGroup,
    StopParams,
    Timings,
    TokenLogprobs,
    TokensEvent,
    Usage,
)
from hotgraph_server.rpc.wire.common import from_duration, to_duration
from hotgraph_server.rpc.wire.graphs import graph_name
from hotgraph_server.text import Tokenizer

GenerationRequest = inference_service_pb2.GenerateRequest | inference_service_pb2.CompleteRequest

ROLES: Final = {
    generation_pb2.CHAT_ROLE_SYSTEM: "system",
    generation_pb2.CHAT_ROLE_USER: "user",
    generation_pb2.CHAT_ROLE_ASSISTANT: "assistant",
    generation_pb2.CHAT_ROLE_TOOL: "tool",
}
GRAPH_MODES: Final = {
    generation_pb2.GRAPH_MODE_UNSPECIFIED: GraphMode.PREFER,
    generation_pb2.GRAPH_MODE_PREFER: GraphMode.PREFER,
    generation_pb2.GRAPH_MODE_REQUIRE: GraphMode.REQUIRE,
    generation_pb2.GRAPH_MODE_EAGER_ONLY: GraphMode.EAGER_ONLY,
    generation_pb2.GRAPH_MODE_WAIT_UP_TO: GraphMode.WAIT_UP_TO,
}
FINISH_REASONS: Final = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}
STEP_PHASES: Final = {
    "prefill": generation_pb2.STEP_PHASE_PREFILL,
    "decode": generation_pb2.STEP_PHASE_DECODE,
    "mixed": generation_pb2.STEP_PHASE_MIXED,
}


@dataclass(frozen=True, slots=True)
class Deadline:
    """On the scheduler's monotonic clock. `is_server_limit`: nobody asked for it, the server sets it. `is_calls`: gRPC knows it
    too, and ends the call by itself."""

    monotonic: float
    is_server_limit: bool
    is_calls: bool = False


# In.


def prompt_messages(chat: generation_pb2.ChatPrompt) -> list[tuple[str, str]]:
    """(role, content) in order."""
    return [(ROLES[message.role], message.content) for message in chat.messages]


def request_from(
    message: GenerationRequest,
    *,
    prompt_token_ids: Sequence[int],
    max_tokens: int,
    vocabulary_size: int,
    deadline: Deadline,
    client: str,
) -> Request:
    """`max_tokens` is the message's own or the default in its place. The message is checked, and has a request id."""
    output = message.output
    return Request(
        request_id=message.request_id,
        prompt_token_ids=tuple(prompt_token_ids),
        max_tokens=max_tokens,
        sampling=_sampling(message.sampling, vocabulary_size),
        stop=_stop(message.stop),
        num_choices=message.num_choices if message.HasField("num_choices") else 1,
        num_logprobs=output.logprobs if output.HasField("logprobs") else None,
        skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
        omit_text=output.omit_text,
        graph_policy=_graph_policy(message.graph_policy),
        deadline=deadline.monotonic,
        is_server_deadline=deadline.is_server_limit,
        client=client,
        session_key=message.session_key,
        resume=MappingProxyType({choice.index: tuple(choice.token_ids) for choice in message.resume}),
    )


def _sampling(message: generation_pb2.SamplingParams, vocabulary_size: int) -> SamplingParams:
    top_k = message.top_k if message.top_k < vocabulary_size else 0  # that many are all
    return SamplingParams(
        temperature=message.temperature or 0.0 if message.HasField("temperature") else 1.0,  # -0.0 is 0
        top_k=top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=MappingProxyType({entry.token_id: entry.bias for entry in message.logit_bias}),
        seed=message.seed if message.HasField("seed") else int.from_bytes(os.urandom(8)),
    )


def _stop(message: generation_pb2.StopConditions) -> StopParams:
    return StopParams(
        strings=tuple(message.strings),
        token_ids=frozenset(message.token_ids),
        include_in_text=message.include_in_text,
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
    )


def _graph_policy(message: generation_pb2.GraphPolicy) -> GraphPolicy:
    mode = GRAPH_MODES[message.mode]
    return GraphPolicy(mode, from_duration(message.max_wait) if mode is GraphMode.WAIT_UP_TO else 0.0)


# Out.


def started_message(request: Request, model_id: str) -> generation_pb2.Started:
    return generation_pb2.Started(
        request_id=request.request_id,
        model=model_id,
        prompt_tokens=len(request.prompt_token_ids),
        seed=request.sampling.seed,
    )


def tokens_message(event: TokensEvent, tokenizer: Tokenizer) -> generation_pb2.Tokens:
    return generation_pb2.Tokens(
        choice_index=event.choice_index,
        token_ids=event.token_ids,
        text=event.text,
        logprobs=[_logprobs_message(logprobs, tokenizer) for logprobs in event.logprobs],
        finish=None if event.finish is None else _finish_message(event.finish),
    )


def choice_message(event: TokensEvent, tokenizer: Tokenizer) -> generation_pb2.Choice:
    """A whole choice: an event into which all its events were joined."""
    return generation_pb2.Choice(
        index=event.choice_index,
        text=event.text,
        token_ids=event.token_ids,
        logprobs=[_logprobs_message(logprobs, tokenizer) for logprobs in event.logprobs],
        finish=None if event.finish is None else _finish_message(event.finish),
    )


def finished_message(event: FinishedEvent) -> generation_pb2.Finished:
    usage, timings, receipt = finished_fields(event)
    return generation_pb2.Finished(
        choices=[_finish_message(finish) for finish in event.choices], usage=usage, timings=timings, receipt=receipt
    )


def finished_fields(
    event: FinishedEvent,
) -> tuple[generation_pb2.Usage, generation_pb2.Timings, generation_pb2.Receipt]:
    """What Finished and CompleteResponse share."""
    return _usage_message(event.usage), _timings_message(event.timings), _receipt_message(event.receipt)


def _finish_message(finish: ChoiceFinish) -> generation_pb2.ChoiceFinish:
    message = generation_pb2.ChoiceFinish(choice_index=finish.choice_index, reason=FINISH_REASONS[finish.reason])
    if finish.stop_string is not None:
        message.stop_string = finish.stop_string
    elif finish.stop_token_id is not None:
        message.stop_token_id = finish.stop_token_id
    return message


def _logprobs_message(logprobs: TokenLogprobs, tokenizer: Tokenizer) -> generation_pb2.TokenLogprobs:
    def one(token_id: int, logprob: float) -> generation_pb2.TokenLogprob:
        return generation_pb2.TokenLogprob(token_id=token_id, logprob=logprob, piece=tokenizer.piece(token_id))

    return generation_pb2.TokenLogprobs(chosen=one(*logprobs.chosen), top=[one(*top) for top in logprobs.top])


def _usage_message(usage: Usage) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
    )


def _timings_message(timings: Timings) -> generation_pb2.Timings:
    message = generation_pb2.Timings(
        queue=to_duration(timings.queue),
        prefill=to_duration(timings.prefill),
        decode=to_duration(timings.decode),
        time_to_first_token=to_duration(timings.time_to_first_token),
        total=to_duration(timings.total),
    )
    if timings.time_per_output_token is not None:
        message.time_per_output_token.CopyFrom(to_duration(timings.time_per_output_token))
    return message


def _receipt_message(receipt: Receipt) -> generation_pb2.Receipt:
    return generation_pb2.Receipt(
        num_steps=receipt.num_steps,
        num_graph_steps=receipt.num_graph_steps,
        num_eager_steps=receipt.num_eager_steps,
        num_preemptions=receipt.num_preemptions,
        step_groups=[_step_group_message(group) for group in receipt.step_groups],
    )


def _step_group_message(group: StepGroup) -> generation_pb2.StepGroup:
    message = generation_pb2.StepGroup(
        phase=STEP_PHASES[group.phase],
        graph=graph_name(group.graph) if group.graph else "",
        num_steps=group.num_steps,
        tokens_bucket=group.tokens_bucket,
        rows_bucket=group.rows_bucket,
        num_padding_tokens=group.num_padding_tokens,
        engine_time=to_duration(group.engine_seconds),
    )
    if group.graph_age_seconds is not None:
        message.graph_age.CopyFrom(to_duration(group.graph_age_seconds))
    return message
