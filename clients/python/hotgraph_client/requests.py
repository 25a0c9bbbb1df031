"""Python arguments to messages of the contract: prompts, sampling, stops. It opens no connection.

What a message cannot even hold (a negative count, an unknown role) is an InvalidRequestError here, as the server would
answer; every bound inside that is the server's to judge.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

from google.protobuf.duration_pb2 import Duration

from hotgraph.v1 import generation_pb2, inference_service_pb2
from hotgraph_client.channel import check_timeout
from hotgraph_client.errors import InvalidRequestError, Violation
from hotgraph_client.types import GraphMode, GraphPolicy, Message, MessageLike, Prompt, Role, SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """One generation to run: the message for the first connection, and what is not in the message.

    `is_repeatable` is whether the same request gives the same tokens again by itself: greedy, or with a seed.
    """

    request: inference_service_pb2.GenerateRequest
    timeout_seconds: float | None
    resume: bool | None
    is_repeatable: bool

    def complete_request(self) -> inference_service_pb2.CompleteRequest:
        """The unary twin of the message, which is the same field by field."""
        return inference_service_pb2.CompleteRequest.FromString(self.request.SerializeToString())


def duration(seconds: float) -> Duration:
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def optional_duration(seconds: float | None) -> Duration | None:
    return None if seconds is None else duration(seconds)


def are_ints(values: Iterable[object]) -> bool:
    """Whether there are some, all of them plain ints."""
    return set(map(type, values)) == {int}


class FieldChecker:
    """Turns values into what a field can hold and remembers every one that does not fit. Wrong types are TypeErrors."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        self.violations.append(Violation(field, description))

    def raise_if_any(self) -> None:
        if self.violations:
            message = "; ".join(f"{v.field}: {v.description}" for v in self.violations)
            raise InvalidRequestError(message, reason="INVALID_REQUEST", violations=self.violations)

    def unsigned(self, field: str, value: int, num_bits: int = 32) -> int:
        number = operator.index(value)
        if not 0 <= number < 1 << num_bits:
            self.add(field, f"must be 0 to {(1 << num_bits) - 1}, not {number}")
            return 0
        return number

    def optional_unsigned(self, field: str, value: int | None, num_bits: int = 32) -> int | None:
        return None if value is None else self.unsigned(field, value, num_bits)

    def unsigned_list(self, field: str, values: Iterable[int]) -> list[int]:
        numbers = list(values)
        if not numbers or (are_ints(numbers) and min(numbers) >= 0 and max(numbers) < 1 << 32):
            return numbers  # a prompt has thousands: naming each costs more than the call
        return [self.unsigned(f"{field}[{i}]", number) for i, number in enumerate(numbers)]

    def text(self, field: str, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            self.add(field, "is no Unicode text: it holds a lone surrogate")
            return ""
        return value


def generation_spec(
    prompt: Prompt,
    *,
    model: str = "",
    request_id: str = "",
    sampling: SamplingParams | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    include_stop: bool | None = None,
    ignore_eos: bool | None = None,
    min_tokens: int | None = None,
    num_choices: int | None = None,
    logprobs: int | None = None,
    skip_special_tokens: bool | None = None,
    omit_text: bool | None = None,
    add_special_tokens: bool | None = None,
    add_generation_prompt: bool | None = None,
    graph_policy: GraphPolicy | GraphMode | str | None = None,
    timeout: float | None = None,
    session_key: str = "",
    resume: bool | None = None,
) -> GenerationSpec:
    """The message of a generation; the keywords are those of GenerateOptions. Raises InvalidRequestError."""
    check_timeout(timeout)
    check = FieldChecker()
    given = sampling or SamplingParams()

    def either(value: float | None, of_sampling: float | None) -> float | None:
        return of_sampling if value is None else value

    bias = given.logit_bias if logit_bias is None else logit_bias
    sampling_message = generation_pb2.SamplingParams(
        temperature=either(temperature, given.temperature),
        top_k=check.optional_unsigned("sampling.top_k", given.top_k if top_k is None else top_k),
        top_p=either(top_p, given.top_p),
        min_p=either(min_p, given.min_p),
        repetition_penalty=either(repetition_penalty, given.repetition_penalty),
        presence_penalty=either(presence_penalty, given.presence_penalty),
        frequency_penalty=either(frequency_penalty, given.frequency_penalty),
        logit_bias=[
            generation_pb2.LogitBias(
                token_id=check.unsigned(f"sampling.logit_bias[{i}].token_id", token_id), bias=value
            )
            for i, (token_id, value) in enumerate(bias.items())
        ],
        seed=check.optional_unsigned("sampling.seed", given.seed if seed is None else seed, num_bits=64),
    )
    strings = [stop] if isinstance(stop, str) else stop
    request = inference_service_pb2.GenerateRequest(
        request_id=check.text("request_id", request_id),
        model=check.text("model", model),
        sampling=sampling_message,
        stop=generation_pb2.StopConditions(
            strings=[check.text(f"stop.strings[{i}]", string) for i, string in enumerate(strings)],
            token_ids=check.unsigned_list("stop.token_ids", stop_token_ids),
            include_in_text=include_stop,
            ignore_eos=ignore_eos,
            min_tokens=check.optional_unsigned("stop.min_tokens", min_tokens),
        ),
        output=generation_pb2.OutputOptions(
            logprobs=check.optional_unsigned("output.logprobs", logprobs),
            skip_special_tokens=skip_special_tokens,
            omit_text=omit_text,
        ),
        max_tokens=check.optional_unsigned("max_tokens", max_tokens),
        num_choices=check.optional_unsigned("num_choices", num_choices),
        graph_policy=_graph_policy(graph_policy, check),
        timeout=optional_duration(timeout),
        session_key=check.text("session_key", session_key),
        add_special_tokens=add_special_tokens,
    )
    if isinstance(prompt, str):
        request.text = check.text("text", prompt)
    elif is_conversation(prompt):
        request.chat.CopyFrom(chat_prompt(prompt, check, add_generation_prompt))
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(check.unsigned_list("token_ids.ids", _token_ids(prompt)))
    check.raise_if_any()
    is_repeatable = sampling_message.HasField("seed") or (
        sampling_message.HasField("temperature") and sampling_message.temperature == 0
    )
    return GenerationSpec(request, timeout, resume, is_repeatable)


def is_conversation(prompt: Prompt) -> bool:
    """Whether a prompt is turns of a conversation rather than text or token ids. An empty one counts as token ids."""
    return not isinstance(prompt, str | bytes) and len(prompt) > 0 and isinstance(prompt[0], Message | tuple | Mapping)


def chat_prompt(
    prompt: Prompt, check: FieldChecker, add_generation_prompt: bool | None = None
) -> generation_pb2.ChatPrompt:
    turns = [_turn(turn, check, f"chat.messages[{i}]") for i, turn in enumerate(prompt)]
    return generation_pb2.ChatPrompt(messages=turns, add_generation_prompt=add_generation_prompt)


def _turn(turn: MessageLike | str | int, check: FieldChecker, field: str) -> generation_pb2.ChatMessage:
    match turn:
        case Message(role, content):
            pass
        case (str(role), str(content)):
            pass
        case {"role": str(role), "content": str(content), **rest}:
            if rest:
                check.add(field, f"unknown keys: {', '.join(sorted(map(str, rest)))}")
        case _:
            raise TypeError(f"{field} must be a Message, a (role, content) pair or a mapping with role and content")
    try:
        number = generation_pb2.ChatRole.Value(f"CHAT_ROLE_{Role(role).name}")
    except ValueError:
        number = generation_pb2.CHAT_ROLE_UNSPECIFIED
    if number == generation_pb2.CHAT_ROLE_UNSPECIFIED:
        roles = ", ".join(r.value for r in Role if r is not Role.UNSPECIFIED)
        check.add(f"{field}.role", f"must be one of {roles}, not {str(role)!r}")
    return generation_pb2.ChatMessage(role=number, content=check.text(f"{field}.content", content))


def _token_ids(prompt: Prompt) -> Iterable[int]:
    if isinstance(prompt, bytes):
        raise TypeError("a prompt of bytes is ambiguous: decode it to text, or give a list of token ids")
    if are_ints(prompt):
        return cast(Sequence[int], prompt)
    ids: list[int] = []
    for item in prompt:
        if isinstance(item, str | Message | tuple | Mapping):
            raise TypeError(f"a prompt of token ids holds a {type(item).__name__}")
        ids.append(operator.index(item))
    return ids


def _graph_policy(
    policy: GraphPolicy | GraphMode | str | None, check: FieldChecker
) -> generation_pb2.GraphPolicy | None:
    if policy is None:
        return None
    if not isinstance(policy, GraphPolicy):
        try:
            policy = GraphPolicy(GraphMode(policy))
        except ValueError:
            check.add("graph_policy.mode", f"must be one of {', '.join(m.value for m in GraphMode)}, not {policy!r}")
            return None
    return generation_pb2.GraphPolicy(
        mode=generation_pb2.GraphMode.Value(f"GRAPH_MODE_{policy.mode.name}"),
        max_wait=optional_duration(policy.max_wait_seconds),
    )
