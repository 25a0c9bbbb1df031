"""What a client reads of a generation, event by event, and what the other inference calls answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from hotgraph.v1 import generation_pb2, graph_service_pb2, inference_service_pb2, model_pb2
from hotgraph.v1.generation_pb2 import (
    ChatMessage,
    ChatPrompt,
    OutputOptions,
    ResumedChoice,
    SamplingParams,
    StopConditions,
    TokenIds,
)
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.config import BOUNDS
from hotgraph_server.engine import FakeEngine, hash_rule
from tests.integration.harness import Serving, eventually, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served() -> AsyncIterator[Serving]:
    async with serving(rule=hash_rule()) as daemon:
        yield daemon


async def events_of(served: Serving, request: GenerateRequest) -> list[inference_service_pb2.GenerateResponse]:
    return [event async for event in served.inference.Generate(request)]


async def test_events_come_in_order_and_add_up(served: Serving) -> None:
    """Started first, tokens between, Finished last; counts, seed and text agree with the unary twin."""
    started, *tokens, finished = await events_of(served, GenerateRequest(text="hello", max_tokens=20))
    assert started.started.model == "fake"
    assert started.started.prompt_tokens == 6  # the beginning-of-text token is one of them
    assert len(started.started.request_id) == 32
    ids = [token_id for event in tokens for token_id in event.tokens.token_ids]
    assert len(ids) == 20
    assert [event.tokens.HasField("finish") for event in tokens] == [False] * (len(tokens) - 1) + [True]
    assert finished.finished.usage.prompt_tokens == 6
    assert finished.finished.usage.completion_tokens == 20
    assert [f.reason for f in finished.finished.choices] == [generation_pb2.FINISH_REASON_LENGTH]
    assert finished.finished.timings.total.ToNanoseconds() > 0
    again = await served.inference.Complete(
        CompleteRequest(text="hello", max_tokens=20, sampling=SamplingParams(seed=started.started.seed))
    )
    assert list(again.choices[0].token_ids) == ids
    assert again.choices[0].text == "".join(event.tokens.text for event in tokens)
    assert again.choices[0].finish == finished.finished.choices[0]
    assert again.seed == started.started.seed


async def test_receipt_names_graphs_that_exist(served: Serving) -> None:
    """Steps add up in the receipt, and each graph it names can be asked for."""

    async def ask() -> set[str]:
        receipt = (await served.inference.Complete(CompleteRequest(text="receipt", max_tokens=30))).receipt
        assert receipt.num_steps == receipt.num_graph_steps + receipt.num_eager_steps == 30
        assert sum(group.num_steps for group in receipt.step_groups) == 30
        return {group.graph for group in receipt.step_groups if group.graph}

    names: set[str] = await eventually(ask)  # none before the first capture is done
    for name in names:
        graph = (await served.graphs.GetGraph(graph_service_pb2.GetGraphRequest(name=name))).graph
        assert graph.name == name
        assert graph.num_hits > 0


async def test_choices_keep_apart(served: Serving) -> None:
    """Each choice has its index, its own tokens and its own finish; choice 0 is what one choice alone gives."""
    sampling = SamplingParams(seed=7)
    response = await served.inference.Complete(
        CompleteRequest(text="n", max_tokens=8, num_choices=3, sampling=sampling)
    )
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert len({choice.text for choice in response.choices}) == 3
    assert response.usage.completion_tokens == 24
    alone = await served.inference.Complete(CompleteRequest(text="n", max_tokens=8, sampling=sampling))
    assert alone.choices[0] == response.choices[0]


async def test_resumed_choices_go_on_exactly(served: Serving) -> None:
    """With the tokens it has and the seed, a client gets what it missed and nothing twice."""
    request: dict[str, Any] = {"text": "go on", "max_tokens": 12, "num_choices": 2, "sampling": SamplingParams(seed=5)}
    whole = await served.inference.Complete(CompleteRequest(**request))
    have = list(whole.choices[1].token_ids)[:5]
    rest = await served.inference.Complete(CompleteRequest(**request, resume=[ResumedChoice(index=1, token_ids=have)]))
    assert [choice.index for choice in rest.choices] == [1]
    assert have + list(rest.choices[0].token_ids) == list(whole.choices[1].token_ids)
    assert rest.usage.completion_tokens == 12


async def test_resuming_what_was_complete_only_finishes(served: Serving) -> None:
    """A client that lost nothing but the last message gets it."""
    request: dict[str, Any] = {"text": "all", "max_tokens": 4, "sampling": SamplingParams(seed=5)}
    whole = await served.inference.Complete(CompleteRequest(**request))
    rest = await served.inference.Complete(
        CompleteRequest(**request, resume=[ResumedChoice(token_ids=whole.choices[0].token_ids)])
    )
    assert list(rest.choices[0].token_ids) == []
    assert rest.choices[0].finish.reason == generation_pb2.FINISH_REASON_LENGTH


async def test_stop_string_is_told_and_cut(served: Serving) -> None:
    """The completion ends before the stop string, and says which it was."""
    request: dict[str, Any] = {"text": "stop", "max_tokens": 40, "sampling": SamplingParams(temperature=0)}
    text = (await served.inference.Complete(CompleteRequest(**request))).choices[0].text
    stop = text[10:13]
    assert text.index(stop) <= 10
    choice = (
        await served.inference.Complete(CompleteRequest(**request, stop=StopConditions(strings=["§§", stop])))
    ).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish.reason == generation_pb2.FINISH_REASON_STOP
    assert choice.finish.stop_string == stop


async def test_stop_token_is_told(served: Serving) -> None:
    """A stop token ends the completion; its id is told and counted."""
    request: dict[str, Any] = {"text": "stop", "max_tokens": 40, "sampling": SamplingParams(temperature=0)}
    ids = list((await served.inference.Complete(CompleteRequest(**request))).choices[0].token_ids)
    stop_id = ids[6]
    choice = (
        await served.inference.Complete(CompleteRequest(**request, stop=StopConditions(token_ids=[stop_id])))
    ).choices[0]
    assert list(choice.token_ids) == ids[: ids.index(stop_id) + 1]
    assert choice.finish.stop_token_id == stop_id


async def test_logprobs_come_with_pieces(served: Serving) -> None:
    """One entry for each token, with as many of the likeliest as asked for; none when not asked."""
    request: dict[str, Any] = {"text": "p", "max_tokens": 3}
    choice = (await served.inference.Complete(CompleteRequest(**request, output=OutputOptions(logprobs=2)))).choices[0]
    assert [entry.chosen.token_id for entry in choice.logprobs] == list(choice.token_ids)
    assert all(len(entry.top) == 2 for entry in choice.logprobs)
    assert choice.logprobs[0].chosen.piece == bytes([choice.token_ids[0]])
    choice = (await served.inference.Complete(CompleteRequest(**request, output=OutputOptions(logprobs=0)))).choices[0]
    assert all(len(entry.top) == 0 and entry.chosen.logprob < 0 for entry in choice.logprobs)
    choice = (await served.inference.Complete(CompleteRequest(**request))).choices[0]
    assert len(choice.logprobs) == 0


async def test_text_can_be_left_out(served: Serving) -> None:
    """omit_text sends ids only."""
    response = await served.inference.Complete(
        CompleteRequest(text="x", max_tokens=4, output=OutputOptions(omit_text=True))
    )
    assert response.choices[0].text == ""
    assert len(response.choices[0].token_ids) == 4


async def test_default_max_tokens_gives_way_to_the_context(served: Serving) -> None:
    """Without max_tokens: the server's default, or what the context has left."""
    response = await served.inference.Complete(CompleteRequest(token_ids=TokenIds(ids=[5] * 3)))
    assert len(response.choices[0].token_ids) == 256
    response = await served.inference.Complete(CompleteRequest(token_ids=TokenIds(ids=[5] * 1000)))
    assert len(response.choices[0].token_ids) == 24


async def test_slow_reader_gets_several_tokens_in_one_event() -> None:
    """Tokens gather while the reader is busy, and none is lost."""
    engine = FakeEngine(rule=hash_rule())
    async with serving(engine=engine) as served:
        whole = await served.inference.Complete(
            CompleteRequest(text="slow", max_tokens=600, sampling=SamplingParams(temperature=0))
        )
        call = served.inference.Generate(
            GenerateRequest(text="slow", max_tokens=600, sampling=SamplingParams(temperature=0))
        )
        events = [event async for event in call]
        tokens = [event.tokens for event in events if event.WhichOneof("event") == "tokens"]
        assert [token_id for event in tokens for token_id in event.token_ids] == list(whole.choices[0].token_ids)
        assert "".join(event.text for event in tokens) == whole.choices[0].text


async def test_chat_is_rendered_with_the_models_template(served: Serving) -> None:
    """Tokenize shows what Generate would see."""
    chat = ChatPrompt(messages=[ChatMessage(role=generation_pb2.CHAT_ROLE_USER, content="hi")])
    tokens = await served.inference.Tokenize(inference_service_pb2.TokenizeRequest(chat=chat))
    assert bytes(tokens.token_ids) == b"<user>hi\n<assistant>"
    response = await served.inference.Complete(CompleteRequest(chat=chat, max_tokens=1))
    assert response.usage.prompt_tokens == len(tokens.token_ids)
    chat.add_generation_prompt = False
    tokens = await served.inference.Tokenize(inference_service_pb2.TokenizeRequest(chat=chat))
    assert bytes(tokens.token_ids) == b"<user>hi\n"


@pytest.mark.parametrize("text", ["", "hello", "a\0b", "﻿bom", "é漢😀", "‮bidi", "x" * 10_000])
async def test_tokenize_and_detokenize_round_trip(served: Serving, text: str) -> None:
    """Any UTF-8 comes back as it was, short and long; pieces join to the text."""
    tokens = await served.inference.Tokenize(inference_service_pb2.TokenizeRequest(text=text, add_special_tokens=False))
    assert b"".join(tokens.pieces).decode() == text
    assert tokens.context_length == 1024
    ids = list(tokens.token_ids)[:1000]
    answer = await served.inference.Detokenize(inference_service_pb2.DetokenizeRequest(token_ids=ids))
    assert answer.text == text.encode()[:1000].decode()


async def test_special_tokens_follow_the_options(served: Serving) -> None:
    """add_special_tokens and skip_special_tokens are true unless said otherwise."""
    tokens = await served.inference.Tokenize(inference_service_pb2.TokenizeRequest(text="a"))
    assert list(tokens.token_ids) == [257, 97]
    plain = await served.inference.Detokenize(inference_service_pb2.DetokenizeRequest(token_ids=[257, 97]))
    assert plain.text == "a"
    full = await served.inference.Detokenize(
        inference_service_pb2.DetokenizeRequest(token_ids=[257, 97], skip_special_tokens=False)
    )
    assert full.text == "<bos>a"
    bare = await served.inference.Complete(CompleteRequest(text="a", max_tokens=1, add_special_tokens=False))
    assert bare.usage.prompt_tokens == 1


async def test_model_tells_its_limits(served: Serving) -> None:
    """GetModel by any of its names is what ListModels lists, with the bounds of the validator."""
    listed = (await served.inference.ListModels(inference_service_pb2.ListModelsRequest())).models
    for name in ("", "fake", "models/fake"):
        model = (await served.inference.GetModel(inference_service_pb2.GetModelRequest(name=name))).model
        assert [model] == list(listed)
    assert (model.name, model.context_length, model.vocabulary_size) == ("models/fake", 1024, 258)
    assert model.runner == model_pb2.MODEL_RUNNER_DECODER
    assert list(model.eos_token_ids) == [256]
    assert model.bos_token_id == 257
    limits = model.limits
    assert limits.max_prompt_bytes == BOUNDS.max_prompt_bytes
    assert limits.max_choices == BOUNDS.max_choices
    assert limits.max_request_duration.seconds == 600


async def test_many_streams_at_once_get_their_own_tokens(served: Serving) -> None:
    """100 streams on one connection, more than there are slots, all end well and none gets another's tokens."""

    async def one(number: int) -> str:
        request = GenerateRequest(text=f"prompt {number}", max_tokens=10, sampling=SamplingParams(temperature=0))
        return "".join([event.tokens.text async for event in served.inference.Generate(request)])

    texts = await asyncio.gather(*(one(number) for number in range(100)))
    again = [await one(number) for number in (0, 50, 99)]
    assert [texts[0], texts[50], texts[99]] == again
    assert len(set(texts)) == 100
