"""The cases of cases.json for the Python client, against the daemons that `python -m tests.interop` started.

It is named so that a plain pytest, which has no such daemons, leaves it alone.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import Default
from google.protobuf.message_factory import GetMessageClass

from hotgraph.v1 import graph_service_pb2 as graphs
from hotgraph.v1 import graph_service_pb2_grpc, inference_service_pb2, inference_service_pb2_grpc
from hotgraph_client import (
    CancelledRequestError,
    Client,
    Completion,
    DeadlineError,
    Finished,
    FinishReason,
    GraphEventType,
    GraphKey,
    GraphMode,
    GraphNotFoundError,
    GraphNotReadyError,
    GraphState,
    Health,
    HotgraphError,
    InvalidRequestError,
    MessageTooLargeError,
    ModelNotFoundError,
    NotPossibleError,
    ResumePolicy,
    SamplerVariant,
    ServiceNotFoundError,
    Started,
    StreamLostError,
    TlsConfig,
    Tokens,
    UnauthenticatedError,
    UnavailableError,
)
from hotgraph_client.status import error_from_call

pytestmark = pytest.mark.usefixtures("case")

PATIENCE_SECONDS = 60.0
STRANGE = "Zwölf Boxkämpfer 漢字 😀 e\u0301 tab\t newline\n return\r bell\a escape\x1b delete\x7f nul\0 end"
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SEEDED: dict[str, Any] = {"seed": 7, "temperature": 0.9, "ignore_eos": True, "max_tokens": 64}


@pytest.fixture(scope="module")
def told() -> Any:
    return json.loads(Path(os.environ["HOTGRAPH_INTEROP"]).read_text(encoding="utf-8"))


@pytest.fixture
def dial() -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(target: str, **settings: Any) -> Client:
        made.append(Client(target, **settings))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(told: Any, dial: Callable[..., Client]) -> Client:
    return dial(told["unix"], max_attempts=1)


@pytest.fixture(scope="module", autouse=True)
def _versions() -> None:
    report(f"language Python {platform.python_version()}")
    report(f"library grpcio {grpc.__version__}")


def report(line: str) -> None:
    path = os.environ.get("HOTGRAPH_INTEROP_REPORT")
    if path is not None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports the case that the test is named for, when it has passed."""
    num_failed = request.session.testsfailed
    yield
    if request.session.testsfailed == num_failed:
        report(f"passed {request.node.name.removeprefix('test_')}")


def wait_free(client: Client) -> None:
    """Until no request holds a slot."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        status = client.get_status()
        if not (status.scheduler.num_running or status.scheduler.num_waiting or status.kv_cache.num_used_blocks):
            return
        assert time.monotonic() < end, status
        time.sleep(0.005)


def test_vectors(told: Any) -> None:
    """Every golden wire vector is read from binary and JSON, and written again as it stands."""
    for entry in json.loads(Path(told["vectors"]).read_text(encoding="utf-8")):
        kind = GetMessageClass(Default().FindMessageTypeByName(entry["type"]))
        binary, text = b64decode(entry["binary"]), entry["json"]
        message = kind.FromString(binary)
        assert json_format.Parse(text, kind()) == message
        assert json_format.MessageToDict(message) == json.loads(text)
        assert message.SerializeToString(deterministic=True) == binary


def test_unary_empty(client: Client, told: Any) -> None:
    """A call whose request has no field (GetStatus) answers."""
    assert client.get_status().model == told["model"]


def test_unary_large(client: Client) -> None:
    """Tokenize of a text of 1 MB answers with pieces that join to that text."""
    text = "All that is gold does not glitter; é漢😀 " * ((1 << 20) // 45)
    tokens = client.tokenize(text, add_special_tokens=False)
    assert b"".join(tokens.pieces).decode() == text


def test_request_too_large(client: Client) -> None:
    """A request over the server's limit fails as MESSAGE_TOO_LARGE with the limit in the metadata."""
    with pytest.raises(MessageTooLargeError) as refused:
        client.tokenize("x" * (5 << 20))
    assert refused.value.metadata["limit_bytes"] == str(4 << 20)


def test_text(client: Client) -> None:
    """UTF-8 of every length, control characters and NUL come back from Detokenize as they went to Tokenize."""
    assert client.detokenize(client.tokenize(STRANGE, add_special_tokens=False).token_ids) == STRANGE


def test_stream(client: Client) -> None:
    """Generate tells started, tokens and finished in this order, with usage, timings and receipt."""
    generation = client.generate("The sky is", max_tokens=12, **GREEDY)
    events = list(generation)
    assert isinstance(events[0], Started)
    assert all(isinstance(event, Tokens) for event in events[1:-1])
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.completion_tokens == 12
    assert events[-1].receipt.num_steps > 0
    assert events[-1].timings.total_seconds > 0
    assert events[-1].choices[0].reason is FinishReason.LENGTH


def test_stream_is_unary(client: Client) -> None:
    """Complete gives the ids and the text of Generate for the same seed."""
    options: dict[str, Any] = {
        "seed": (1 << 64) - 1,
        "temperature": 0.8,
        "num_choices": 2,
        "logprobs": 2,
        "max_tokens": 16,
    }
    streamed = client.generate("Once upon a time", **options).result()
    unary = client.complete("Once upon a time", **options)
    assert [(c.token_ids, c.text) for c in streamed.choices] == [(c.token_ids, c.text) for c in unary.choices]
    assert unary.seed == (1 << 64) - 1


def test_chat(client: Client) -> None:
    """A conversation in the model's own template is answered: the capital of France is Paris."""
    turns = [("system", "Be brief."), ("user", "What is the capital of France?")]
    assert "Paris" in client.generate(turns, temperature=0, max_tokens=24).result().text


def test_slow_reader(client: Client) -> None:
    """A reader that stops for a while gets every token all the same, and others are served meanwhile."""
    fast = client.generate("The sky is", max_tokens=40, **GREEDY).result()
    generation = client.generate("The sky is", max_tokens=40, **GREEDY)
    for i, _ in enumerate(generation):
        if i == 2:
            client.complete("others", max_tokens=4, **GREEDY)
            time.sleep(1)
    assert generation.choices[0].token_ids == fast.token_ids


def test_cancel_at_once(client: Client) -> None:
    """A stream left before its first event holds no slot any more."""
    generation = client.generate("The sky is", max_tokens=1000, **GREEDY)
    generation.cancel()
    with pytest.raises(CancelledRequestError):
        next(generation)
    wait_free(client)


def test_cancel_midway(client: Client) -> None:
    """A stream left after some tokens ends as cancelled and holds no slot any more."""
    with client.generate("The sky is", max_tokens=1000, **GREEDY) as generation:
        for _ in generation:
            if len(generation.choices[0].token_ids) >= 3:
                assert client.get_status().scheduler.num_running == 1
                break
    wait_free(client)
    generation = client.generate("The sky is", max_tokens=1000, **GREEDY)
    next(generation)
    threading.Timer(0.2, generation.cancel).start()
    with pytest.raises(CancelledRequestError):
        generation.result()
    wait_free(client)


def test_deadline(client: Client) -> None:
    """A call's deadline ends it as DEADLINE_EXCEEDED within a second of its time, and the slot is free."""
    begin = time.monotonic()
    with pytest.raises(DeadlineError):
        client.generate("The sky is", max_tokens=1000, timeout=0.7, **GREEDY).result()
    assert time.monotonic() - begin < 1.7
    wait_free(client)


def test_timeout_field(told: Any, client: Client) -> None:
    """GenerateRequest.timeout ends the request; by the plain stub, as the client's timeout is the call's deadline too."""
    request = inference_service_pb2.GenerateRequest(text="The sky is", max_tokens=1000)
    request.timeout.FromMilliseconds(500)
    with grpc.insecure_channel(told["unix"]) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            list(inference_service_pb2_grpc.InferenceServiceStub(channel).Generate(request))
        assert error_from_call(refused.value).reason == "DEADLINE_EXCEEDED"
    wait_free(client)


def test_violations(client: Client) -> None:
    """An invalid request names each of its wrong fields, and why."""
    with pytest.raises(InvalidRequestError) as refused:
        client.complete(
            "",
            request_id="no spaces",
            max_tokens=0,
            num_choices=17,
            temperature=3,
            top_p=0,
            min_p=2,
            repetition_penalty=0,
            presence_penalty=-3,
            frequency_penalty=3,
            logit_bias={1: 101},
            stop=[""],
            logprobs=21,
        )
    assert {v.field for v in refused.value.violations} == {
        "max_tokens", "num_choices", "output.logprobs", "request_id", "sampling.frequency_penalty",
        "sampling.logit_bias[0].bias", "sampling.min_p", "sampling.presence_penalty", "sampling.repetition_penalty",
        "sampling.temperature", "sampling.top_p", "stop.strings[0]", "text",
    }  # fmt: skip
    assert all(v.description for v in refused.value.violations)


def test_status_message(client: Client) -> None:
    """A status message and details with UTF-8 and control characters arrive as they were sent."""
    name = "naïve 😀\t\n\x7f%"
    with pytest.raises(ModelNotFoundError) as refused:
        client.get_model(name)
    assert refused.value.resource is not None
    assert refused.value.resource.name == name
    assert "naïve 😀" in refused.value.message


def test_not_found(client: Client) -> None:
    """NOT_FOUND tells the type and the name of what is not there."""
    with pytest.raises(GraphNotFoundError) as refused:
        client.get_graph("graphs/none")
    assert refused.value.resource is not None
    assert (refused.value.resource.type, refused.value.resource.name) == ("hotgraph.v1.Graph", "graphs/none")


def test_retry_info(client: Client) -> None:
    """A refusal that may pass tells after how long to come again."""
    for graph in client.list_graphs([GraphState.READY]):
        client.evict_graph(graph.name)
    with pytest.raises(GraphNotReadyError) as refused:
        client.generate("The sky is", max_tokens=4, num_choices=7, top_k=5, graph_policy=GraphMode.REQUIRE).result()
    assert (refused.value.retry_after_seconds or 0) > 0


def test_unimplemented(told: Any) -> None:
    """An unknown method and an unknown service fail as UNIMPLEMENTED."""
    with grpc.insecure_channel(told["unix"]) as channel:
        for service in ("InferenceService", "DreamService"):
            dream: Any = channel.unary_unary(f"/hotgraph.v1.{service}/Dream")
            with pytest.raises(grpc.RpcError) as refused:
                dream(b"")
            error = error_from_call(refused.value)
            assert isinstance(error, NotPossibleError)
            assert error.code is grpc.StatusCode.UNIMPLEMENTED


def test_client_id(told: Any, client: Client, dial: Callable[..., Client]) -> None:
    """X-client-id and the user agent are what ListClients shows."""
    dial(told["unix"], client_id="interop-python").complete("hello", max_tokens=1)
    (found,) = (other for other in client.list_clients() if other.name == "clients/interop-python")
    assert "hotgraph-python" in found.user_agent
    assert found.num_requests > 0


def test_pages(told: Any, client: Client) -> None:
    """By the plain stub: the client asks for pages of a thousand."""
    keys = [GraphKey(tokens=4, rows=rows, sampler=SamplerVariant.GREEDY) for rows in (1, 2, 3)]
    assert len(client.prewarm_graphs(keys, wait_seconds=30)) >= 2
    names, token = [], ""
    with grpc.insecure_channel(told["unix"]) as channel:
        stub = graph_service_pb2_grpc.GraphServiceStub(channel)
        while True:
            page = stub.ListGraphs(graphs.ListGraphsRequest(page_size=1, page_token=token))
            names += [graph.name for graph in page.graphs]
            token = page.next_page_token
            if not token:
                break
    assert len(names) == len(set(names)) == page.total_size > 1
    assert sorted(names) == sorted(graph.name for graph in client.list_graphs())


def test_graphs(client: Client) -> None:
    """A prewarmed graph is listed, got, pinned and unpinned, and the watch tells of it."""
    keys = [GraphKey(tokens=4, rows=1, sampler=SamplerVariant.GREEDY)]
    (ready,) = client.prewarm_graphs(keys, wait_seconds=30)
    assert client.get_graph(ready.name).key == ready.key
    assert client.pin_graph(ready.name).pin_expire_time is not None
    client.unpin_graph(ready.name)
    wanted = [GraphEventType.PLANNED, GraphEventType.PUBLISHED, GraphEventType.PINNED, GraphEventType.UNPINNED]
    with client.watch_graphs(after_sequence=0) as events:
        for event in events:
            if event.type is wanted[0] and event.graph is not None and event.graph.name == ready.name:
                wanted.pop(0)
            if not wanted:
                break


def test_health(client: Client) -> None:
    """Grpc.health.v1 tells SERVING, and NOT_FOUND of a service it does not know."""
    assert client.check_health() is Health.SERVING
    with client.watch_health("hotgraph.v1.InferenceService") as states:
        assert next(states) is Health.SERVING
    with pytest.raises(ServiceNotFoundError):
        client.check_health("none")


def check(client: Client) -> None:
    streamed = client.generate("hello", max_tokens=2, **GREEDY).result()
    assert streamed.token_ids == client.complete("hello", max_tokens=2, **GREEDY).token_ids


def fails(client: Client, kind: type[HotgraphError]) -> None:
    with pytest.raises(kind):
        client.complete("hello", max_tokens=1, timeout=PATIENCE_SECONDS)


def test_tcp(told: Any, dial: Callable[..., Client]) -> None:
    """The same over TCP."""
    check(dial(told["tcp"]))
    check(dial(f"ipv4:127.0.0.1:1,{told['tcp']}"))  # nobody listens at the first address


def tls_config(part: dict[str, str], *, is_mutual: bool = False) -> TlsConfig:
    return TlsConfig.from_files(
        root_certificates=part["root_certificates"],
        certificate_chain=part["certificate_chain"] if is_mutual else None,
        private_key=part["private_key"] if is_mutual else None,
    )


def test_tls(told: Any, dial: Callable[..., Client]) -> None:
    """Over TLS with a CA of one's own; not without it."""
    part = told["tls"]
    check(dial(part["target"], tls=tls_config(part), token=part["token"]))
    fails(dial(part["target"], tls=True, token=part["token"], max_attempts=1), UnavailableError)
    fails(dial(part["target"], token=part["token"], max_attempts=1), UnavailableError)


def test_token(told: Any, dial: Callable[..., Client]) -> None:
    """With a bearer token; without one or with a wrong one UNAUTHENTICATED."""
    part = told["tls"]
    for token in ("wrong", None):
        fails(dial(part["target"], tls=tls_config(part), token=token), UnauthenticatedError)


def test_mutual_tls(told: Any, dial: Callable[..., Client]) -> None:
    """Over mutual TLS with a client certificate; not without one."""
    part = told["mutual_tls"]
    check(dial(part["target"], tls=tls_config(part, is_mutual=True)))
    fails(dial(part["target"], tls=tls_config(part), max_attempts=1), UnavailableError)


def test_token_in_the_clear(dial: Callable[..., Client]) -> None:
    """A token is not sent over plain TCP to another host unless one says so."""
    for target in ("gpu-host:50051", "ipv4:127.0.0.1:1,10.0.0.1:1", "[2001:db8::1]:50051"):
        with pytest.raises(ValueError, match="plain text"):
            dial(target, token="secret")
        dial(target, token="secret", allow_insecure_token=True)
    for target in ("unix:s", "localhost:1", "127.0.0.1:1", "[::1]:1"):
        dial(target, token="secret")


def check_resumed(result: Completion, whole: Completion) -> None:
    assert result.num_resumes > 0
    assert (result.token_ids, result.text) == (whole.token_ids, whole.text)
    assert result.usage.completion_tokens == whole.usage.completion_tokens


def test_drain_and_resume(told: Any, client: Client, dial: Callable[..., Client]) -> None:
    """A stream whose daemon drains goes on at the next one: the tokens of an unbroken stream."""
    whole = client.generate("Once upon a time", **SEEDED).result()
    generation = dial(told["handover"]["target"]).generate("Once upon a time", **SEEDED)
    while not generation.text:
        next(generation)
    assert dial(told["handover"]["drained"]).drain(grace_seconds=0.3).num_requests == 1
    check_resumed(generation.result(), whole)


def test_cut_and_resume(told: Any, client: Client, dial: Callable[..., Client]) -> None:
    """A stream whose connection is cut goes on over a new one: the tokens of an unbroken stream."""
    whole = client.generate("Once upon a time", **SEEDED).result()
    patient = dial(told["cut"], resume_policy=ResumePolicy(max_losses=64))
    check_resumed(patient.generate("Once upon a time", **SEEDED).result(), whole)
    with pytest.raises(StreamLostError) as lost:
        dial(told["cut"]).generate("Once upon a time", resume=False, **SEEDED).result()
    assert lost.value.choices[0].token_ids
    wait_free(client)


def test_headers_cut(told: Any, client: Client, dial: Callable[..., Client]) -> None:
    """A stream cut between the server's headers and its first event is asked for again, as often as allowed."""
    whole = client.generate("Once upon a time", **SEEDED).result()
    result = dial(told["headers_cut"]).generate("Once upon a time", request_id="cut", **SEEDED).result()
    assert (result.request_id, result.num_resumes) == ("cut/resume-2", 0)
    assert (result.token_ids, result.text) == (whole.token_ids, whole.text)
    with pytest.raises(UnavailableError):
        dial(told["headers_cut"]).generate("Once upon a time", resume=False, **SEEDED).result()
    drawn = dial(told["headers_cut"], max_attempts=1, resume_policy=ResumePolicy(max_losses=1))
    assert drawn.generate("Once upon a time", request_id="drawn", max_tokens=4).result().request_id == "drawn/resume-1"
    wait_free(client)


def test_soak(told: Any, client: Client) -> None:
    """200 calls on one channel and one on each of 20 channels all succeed."""
    for _ in range(200):
        assert client.detokenize([504, 6376])
    for _ in range(20):
        with Client(told["unix"], max_attempts=1) as other:
            assert other.detokenize([504, 6376])
