"""Python arguments to messages: prompts, sampling, what is refused before anything is sent."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest

from hotgraph.v1 import generation_pb2
from hotgraph_client import GraphMode, GraphPolicy, InvalidRequestError, Message, Role, SamplingParams
from hotgraph_client.requests import generation_spec
from hotgraph_client.types import GenerateOptions

EVERYTHING: dict[str, Any] = {
    "model": "m",
    "request_id": "r",
    "sampling": SamplingParams(temperature=0.5, top_k=9, logit_bias={3: -1.0}),
    "temperature": 0.25,
    "top_k": 4,
    "top_p": 0.5,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {7: 2.0, 8: -100.0},
    "seed": 2**64 - 1,
    "max_tokens": 10,
    "stop": ("x", "y"),
    "stop_token_ids": (1, 2),
    "include_stop": True,
    "ignore_eos": True,
    "min_tokens": 3,
    "num_choices": 2,
    "logprobs": 0,
    "skip_special_tokens": False,
    "omit_text": True,
    "add_special_tokens": False,
    "add_generation_prompt": False,
    "graph_policy": GraphPolicy(GraphMode.WAIT_UP_TO, 1.5),
    "timeout": 2.5,
    "session_key": "s",
    "resume": False,
}


def violated(**options: Any) -> list[str]:
    """The fields that the request is refused for."""
    with pytest.raises(InvalidRequestError) as raised:
        generation_spec(options.pop("prompt", "text"), **options)
    assert raised.value.reason == "INVALID_REQUEST"
    return [violation.field for violation in raised.value.violations]


def test_options_are_those_of_the_typed_dictionary() -> None:
    """The keywords of generate, as typed, are exactly those that make the message."""
    parameters = list(inspect.signature(generation_spec).parameters)[1:]
    assert parameters == list(GenerateOptions.__annotations__) == list(EVERYTHING)


def test_every_option_is_in_the_message() -> None:
    """Each keyword reaches its field, and keywords override those of `sampling`."""
    spec = generation_spec([5, 6], **EVERYTHING)
    request = spec.request
    assert list(request.token_ids.ids) == [5, 6]
    assert (request.model, request.request_id, request.session_key) == ("m", "r", "s")
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.25, 4, 0.5, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 0.5, -0.5)
    assert {bias.token_id: bias.bias for bias in sampling.logit_bias} == {7: 2.0, 8: -100.0}
    assert sampling.seed == 2**64 - 1
    assert (request.max_tokens, request.num_choices) == (10, 2)
    assert (list(request.stop.strings), list(request.stop.token_ids)) == (["x", "y"], [1, 2])
    assert (request.stop.include_in_text, request.stop.ignore_eos, request.stop.min_tokens) == (True, True, 3)
    assert request.output.HasField("logprobs")
    assert (request.output.logprobs, request.output.skip_special_tokens, request.output.omit_text) == (0, False, True)
    assert request.HasField("add_special_tokens")
    assert not request.add_special_tokens
    assert request.graph_policy.mode == generation_pb2.GRAPH_MODE_WAIT_UP_TO
    assert request.graph_policy.max_wait.ToMilliseconds() == 1500
    assert request.timeout.ToMilliseconds() == 2500
    assert (spec.timeout_seconds, spec.resume, spec.is_repeatable) == (2.5, False, True)


def test_nothing_given_leaves_fields_absent() -> None:
    """What is left out is absent, so that the server's defaults hold."""
    request = generation_spec("text").request
    assert [field.name for field, _ in request.ListFields()] == ["text", "sampling", "stop", "output"]
    for section in (request.sampling, request.stop, request.output):
        assert section.ListFields() == []


def test_the_unary_twin_is_the_same_field_by_field() -> None:
    """Complete's message holds what Generate's does, in fields of the same names."""
    spec = generation_spec([("user", "hi")], **EVERYTHING)
    twin = spec.complete_request()
    assert {f.name: v for f, v in twin.ListFields()} == {f.name: v for f, v in spec.request.ListFields()}


@pytest.mark.parametrize(
    "turn", [Message("user", "hi"), Message(Role.USER, "hi"), ("user", "hi"), {"role": "user", "content": "hi"}]
)
def test_kinds_of_turns(turn: Any) -> None:
    """A turn is a Message, a pair or a mapping; all make the same chat prompt."""
    request = generation_spec([turn], add_generation_prompt=False).request
    expected = generation_pb2.ChatMessage(role=generation_pb2.CHAT_ROLE_USER, content="hi")
    assert list(request.chat.messages) == [expected]
    assert request.chat.HasField("add_generation_prompt")


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.UNSPECIFIED])
def test_all_roles(role: Role) -> None:
    """Every role of the contract can be named."""
    request = generation_spec([(role.value, "")]).request
    assert generation_pb2.ChatRole.Name(request.chat.messages[0].role) == f"CHAT_ROLE_{role.name}"


@pytest.mark.parametrize(
    "prompt", [b"bytes", [1.5], [1, "a"], [("user",)], [{"role": "user"}], [("user", 1)], ["text"], [("user", "a"), 3]]
)
def test_prompts_of_the_wrong_type(prompt: Any) -> None:
    """What is neither text, token ids nor turns is a TypeError, before anything is sent."""
    with pytest.raises(TypeError):
        generation_spec(prompt)


def test_empty_token_ids_are_the_servers_to_refuse() -> None:
    """An empty sequence goes out as empty token ids, which the server refuses by name."""
    assert generation_spec([]).request.WhichOneof("prompt") == "token_ids"


def test_all_violations_at_once() -> None:
    """Every value that no message can hold is named, in one error."""
    assert violated(
        prompt=[("wizard", "\ud800")],
        top_k=-1,
        seed=2**64,
        max_tokens=2**32,
        stop_token_ids=[1, -2],
        logit_bias={-5: 1.0},
        stop=["\udfff"],
        graph_policy="sometimes",
    ) == [
        "sampling.top_k",
        "sampling.logit_bias[0].token_id",
        "sampling.seed",
        "stop.strings[0]",
        "stop.token_ids[1]",
        "max_tokens",
        "graph_policy.mode",
        "chat.messages[0].role",
        "chat.messages[0].content",
    ]


def test_token_ids_out_of_range() -> None:
    """Each token id that no field can hold is named by its place."""
    assert violated(prompt=[1, -1, 2**32]) == ["token_ids.ids[1]", "token_ids.ids[2]"]


def test_unknown_keys_of_a_turn() -> None:
    """A mapping with more than role and content is refused, so that nothing is lost silently."""
    assert violated(prompt=[{"role": "user", "content": "", "name": "x"}]) == ["chat.messages[0]"]


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_timeouts_are_positive(timeout: float) -> None:
    """A timeout that is not a positive number of seconds is a ValueError."""
    with pytest.raises(ValueError, match="timeout"):
        generation_spec("text", timeout=timeout)


@pytest.mark.parametrize(
    ("options", "is_repeatable"),
    [
        ({}, False),
        ({"temperature": 0}, True),
        ({"temperature": 0.5}, False),
        ({"seed": 0}, True),
        ({"sampling": SamplingParams(seed=3)}, True),
        ({"sampling": SamplingParams(temperature=0.0), "temperature": 1.0}, False),
    ],
)
def test_what_is_repeatable(options: dict[str, Any], is_repeatable: bool) -> None:
    """Greedy and seeded requests give the same again; a seed of zero is a seed."""
    assert generation_spec("text", **options).is_repeatable is is_repeatable


@pytest.mark.parametrize("policy", ["eager_only", GraphMode.EAGER_ONLY, GraphPolicy(GraphMode.EAGER_ONLY)])
def test_kinds_of_graph_policies(policy: Any) -> None:
    """A graph policy is one, a mode, or a mode's value."""
    request = generation_spec("text", graph_policy=policy).request
    assert request.graph_policy.mode == generation_pb2.GRAPH_MODE_EAGER_ONLY
    assert not request.graph_policy.HasField("max_wait")


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_a_wrong_id_among_thousands_is_named(wrong: int) -> None:
    """One token id that no field can hold is named by its place in a long prompt; ints of other types are taken as ints."""
    ids = [random.randrange(2**32) for _ in range(3000)]
    assert list(generation_spec(ids).request.token_ids.ids) == ids
    assert list(generation_spec([*ids, True]).request.token_ids.ids) == [*ids, 1]
    assert violated(prompt=[*ids[:2000], wrong, *ids[2000:]]) == ["token_ids.ids[2000]"]
