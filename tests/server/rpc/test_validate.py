"""Bounds by property: inside passes, outside is named. The table of whole requests is in the integration tests."""

from __future__ import annotations

import math

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from hotgraph.v1 import generation_pb2
from hotgraph.v1.inference_service_pb2 import GenerateRequest
from hotgraph_server.config import BOUNDS
from hotgraph_server.errors import ContextLengthError, InvalidRequestError
from hotgraph_server.rpc import validate
from hotgraph_server.rpc.validate import ModelLimits, Violations

LIMITS = ModelLimits(vocabulary_size=100, context_length=64)

float32 = st.floats(width=32)


def fields_of(request: GenerateRequest) -> set[str]:
    try:
        validate.check_generation(request, LIMITS)
    except InvalidRequestError as error:
        return {violation.field for violation in error.violations}
    return set()


def is_in(value: float, low: float, high: float) -> bool:
    return not math.isnan(value) and low <= value <= high


@given(
    temperature=float32,
    top_p=float32,
    min_p=float32,
    repetition=float32,
    presence=float32,
    frequency=float32,
    bias=float32,
)
def test_sampling_numbers_are_judged_one_by_one(
    temperature: float, top_p: float, min_p: float, repetition: float, presence: float, frequency: float, bias: float
) -> None:
    """Exactly those outside their range are named, whatever the others are."""
    request = GenerateRequest(
        text="x",
        sampling=generation_pb2.SamplingParams(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=[generation_pb2.LogitBias(token_id=1, bias=bias)],
        ),
    )
    good = {
        "sampling.temperature": temperature == 0 or is_in(temperature, 0.00999999, BOUNDS.max_temperature),
        "sampling.top_p": top_p > 0 and is_in(top_p, 0, 1),
        "sampling.min_p": is_in(min_p, 0, 1),
        "sampling.repetition_penalty": repetition > 0 and is_in(repetition, 0, BOUNDS.max_repetition_penalty),
        "sampling.presence_penalty": is_in(presence, -2, 2),
        "sampling.frequency_penalty": is_in(frequency, -2, 2),
        "sampling.logit_bias[0].bias": is_in(bias, -100, 100),
    }
    assert fields_of(request) == {field for field, is_good in good.items() if not is_good}


@given(st.lists(st.integers(0, 120), min_size=1, max_size=63))
def test_token_ids_outside_are_named_by_index(ids: list[int]) -> None:
    """The first few wrong ones, in order."""
    wrong = [f"token_ids.ids[{i}]" for i, token_id in enumerate(ids) if token_id >= 100]
    request = GenerateRequest(token_ids=generation_pb2.TokenIds(ids=ids))
    assert fields_of(request) == set(wrong[: validate.MAX_LISTED_ITEMS])


@given(st.integers(60, 300))
def test_too_many_ids_are_a_context_error(num_ids: int) -> None:
    """What cannot fit is CONTEXT_LENGTH, with the numbers, whatever the ids are."""
    request = GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[7] * num_ids))
    if num_ids < 64:
        validate.check_generation(request, LIMITS)
    else:
        with pytest.raises(ContextLengthError) as caught:
            validate.check_generation(request, LIMITS)
        assert (caught.value.limit, caught.value.prompt_tokens) == (64, num_ids)


@given(seconds=st.integers(-(2**63), 2**63 - 1), nanos=st.integers(-(2**31), 2**31 - 1))
def test_durations_are_judged_as_their_type_says(seconds: int, nanos: int) -> None:
    """Any 64 and 32 bits either are a duration in (0, 60] or are named."""
    found = Violations()
    found.duration("wait", Duration(seconds=seconds, nanos=nanos), 60)
    is_good = abs(nanos) < 10**9 and seconds * nanos >= 0 and 0 < seconds * 10**9 + nanos <= 60 * 10**9
    assert bool(found) is not is_good


@given(st.text(max_size=140))
def test_identifiers_are_ascii_and_short(text: str) -> None:
    """Only the letters of the rule, and at most 128 of them; no trailing line end slips through."""
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:/-")
    assert validate.is_identifier(text) is (0 < len(text) <= 128 and set(text) <= allowed)


@pytest.mark.parametrize(("asked", "given_size"), [(0, 50), (1, 1), (100, 100), (101, 100), (2**31 - 1, 100)])
def test_page_sizes_are_capped(asked: int, given_size: int) -> None:
    """0 is the default and too much is the most."""
    assert validate.check_page_size(asked, default=50, maximum=100) == given_size


@pytest.mark.parametrize("name", ["", "graphs/", "graph/x", "t1-r1-greedy", "models/x"])
def test_only_resource_names_of_graphs_are_taken(name: str) -> None:
    """Anything else is refused before the cache is asked."""
    with pytest.raises(InvalidRequestError):
        validate.check_graph_name(name)
    assert validate.check_graph_name("graphs/x/y") == "x/y"
