"""Traces, as a collector gets them over the wire: below the caller's span, part by part, cancelled when cancelled, no text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from hotgraph.v1 import generation_pb2
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.config import MetricsSettings, TraceSettings
from hotgraph_server.engine import FakeEngine
from hotgraph_server.errors import SettingsError
from tests.integration.harness import eventually, letters, refused, serving

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)

MARKER = "xylophone-7261"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.address = ""

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  (the protocol's name)
        self.spans += [
            span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
        ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def settings(self, **changes: Any) -> TraceSettings:
        return TraceSettings(endpoint=f"http://{self.address}", **changes)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add(made, server)
        made.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield made
        server.stop(None).wait()


def attributes(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {item.key: plain(item.value) for item in span.attributes}


async def test_a_call_and_its_parts(collector: Collector) -> None:
    """A finished request is a span below its caller's, with queue, prefill and decode one after the other in it."""
    async with serving(traces=collector.settings()) as served:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
        await served.inference.Complete(CompleteRequest(text=MARKER, max_tokens=5, request_id="r1"), metadata=metadata)
    (call,) = collector.named("hotgraph.v1.InferenceService/Complete")
    assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, PARENT)
    assert call.status.code == 0
    found = attributes(call)
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "fake"
    assert found["gen_ai.response.id"] == "r1"
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (len(MARKER) + 1, 5)
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    assert found["rpc.grpc.status_code"] == 0
    parts = [collector.named(name)[0] for name in ("queue", "prefill", "decode")]
    assert all(part.parent_span_id == call.span_id and part.trace_id == call.trace_id for part in parts)
    edges = [edge for part in parts for edge in (part.start_time_unix_nano, part.end_time_unix_nano)]
    assert edges == sorted(edges)
    assert edges[1:-1:2] == edges[2::2]
    slack = 1_000_000  # both clocks are read one after the other
    assert call.start_time_unix_nano - slack <= edges[0] <= edges[-1] <= call.end_time_unix_nano + slack
    assert not collector.named("capture wait")


async def test_ends_that_are_no_finish(collector: Collector) -> None:
    """A call that its caller left is cancelled and no error; one that broke is an error; refused ones have their reason."""
    engine = FakeEngine(rule=letters, step_seconds=0.002)
    async with serving(
        engine=engine, traces=collector.settings(), metrics=MetricsSettings(listen=("127.0.0.1:0",))
    ) as served:
        call = served.inference.Generate(GenerateRequest(text="hello", max_tokens=900))
        async for event in call:
            if event.HasField("tokens"):
                break
        call.cancel()
        await eventually(served.is_all_free)
        await refused(served.inference.Complete(CompleteRequest(text="hello", max_tokens=0)))
        engine.fail_rows(len(engine.batches), [0])
        await refused(served.inference.Complete(CompleteRequest(text="hello", max_tokens=4)))
    (left,) = collector.named("hotgraph.v1.InferenceService/Generate")
    assert left.status.code == 0
    assert attributes(left)["rpc.response.status_code"] == "CANCELLED"
    assert attributes(left)["gen_ai.response.finish_reasons"] == ["cancelled"]
    ends = {attributes(span)["error.type"]: span for span in collector.named("hotgraph.v1.InferenceService/Complete")}
    assert ends.keys() == {"INVALID_REQUEST", "INTERNAL"}
    assert ends["INVALID_REQUEST"].status.code == 0
    assert ends["INTERNAL"].status.code == 2


async def test_waiting_for_a_capture(collector: Collector) -> None:
    """A request that asked to wait for its graphs has that wait as a part of its own."""
    async with serving(traces=collector.settings()) as served:
        request = CompleteRequest(text="hello", max_tokens=4)
        request.graph_policy.mode = generation_pb2.GRAPH_MODE_WAIT_UP_TO
        request.graph_policy.max_wait.seconds = 5
        await served.inference.Complete(request)
    assert len(collector.named("capture wait")) == 1


async def test_no_text_and_sampling(collector: Collector) -> None:
    """Nothing that was sent is in any span; with a ratio of 0 only callers that trace are traced."""
    async with serving(traces=collector.settings(sample_ratio=0.0)) as served:
        request = CompleteRequest(text=MARKER, max_tokens=5)
        request.stop.strings.append(MARKER)
        await served.inference.Complete(request)
        await served.inference.Complete(request, metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"),))
        await served.inference.Complete(request, metadata=(("traceparent", f"00-{TRACE}-{PARENT}-00"),))
        await served.inference.Complete(request, metadata=(("traceparent", "no such thing"),))
    assert len(collector.named("hotgraph.v1.InferenceService/Complete")) == 1
    assert not [span for span in collector.spans if MARKER in str(span)]


async def test_a_collector_that_is_away() -> None:
    """Without anyone to take the spans requests are served all the same, and the daemon ends in time."""
    async with serving(traces=TraceSettings(endpoint="http://127.0.0.1:9")) as served:
        for _ in range(3):
            await served.check_alive()


async def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where OpenTelemetry is not installed the start is refused, and says what to install."""
    monkeypatch.delitem(sys.modules, "hotgraph_server.observability.traces", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"hotgraph\[otel\]"):
        async with serving(traces=TraceSettings(endpoint="http://127.0.0.1:9")):
            raise AssertionError("it started")


def test_nothing_is_imported_unless_asked_for() -> None:
    """A daemon without metrics and traces imports neither library."""
    program = (
        "import sys, hotgraph_server.daemon; "
        "print([name for name in sys.modules if name.startswith(('prometheus_client', 'opentelemetry'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("endpoint", ["collector:4317", "ftp://collector", "http://"])
async def test_endpoints_that_are_none(endpoint: str) -> None:
    """What is no address of a collector is refused at the start."""
    with pytest.raises(SettingsError, match=r"traces\.endpoint wants"):
        async with serving(traces=TraceSettings(endpoint=endpoint)):
            raise AssertionError("it started")
