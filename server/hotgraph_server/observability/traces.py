"""Traces over OTLP: each call a span below its caller's, with the parts of a generation in it. It counts and decides nothing.

Spans are made when the call is over, from times that were noted anyway: a request under way costs nothing for them. Attributes
follow OpenTelemetry's conventions for RPC and generative AI; they hold numbers and names, never a text of users.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final
from urllib.parse import urlsplit

from hotgraph_server.batch import StepOutput
from hotgraph_server.config import TraceSettings
from hotgraph_server.errors import HotgraphError, SettingsError
from hotgraph_server.request import FinishedEvent, Request
from hotgraph_server.rpc.call import Call
from hotgraph_server.scheduler.sequence import Sequence
from hotgraph_server.scheduler.ticket import Ticket

try:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise SettingsError(f"traces.endpoint wants the extra otel: pip install 'hotgraph[otel]' ({error.name})") from None

GRPC_CODES: Final = {"OK": 0, "CANCELLED": 1, "DEADLINE_EXCEEDED": 4, "RESOURCE_EXHAUSTED": 8, "UNAVAILABLE": 14}
# Of a server's span the conventions call these errors; the others are the caller's doing.
SERVER_ERRORS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
EXPORT_TIMEOUT_MILLISECONDS: Final = 5000
NANOSECONDS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class _Generation:
    """What is left of a request that ended. Times are seconds on time.monotonic, which is the scheduler's clock."""

    request: Request
    end: FinishedEvent | HotgraphError
    accept_time: float
    graphs_ready_time: float | None
    first_step_time: float | None
    first_token_time: float | None
    end_time: float
    num_completion_tokens: int
    num_cached_tokens: int


class Traces:
    """An observer of calls and of the scheduler. Event loop's thread only; spans leave on a thread of the library's."""

    def __init__(self, settings: TraceSettings) -> None:
        """Raises SettingsError."""
        parts = urlsplit(settings.endpoint or "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(
                f"traces.endpoint wants http://HOST:PORT or https://HOST:PORT, not {settings.endpoint!r}"
            )
        exporter = OTLPSpanExporter(endpoint=settings.endpoint, insecure=parts.scheme == "http", timeout=5)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=Resource.create({"service.name": "hotgraph", "service.version": version("hotgraph")}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, export_timeout_millis=EXPORT_TIMEOUT_MILLISECONDS)
        )
        self._tracer = self._provider.get_tracer("hotgraph")
        self._propagator = TraceContextTextMapPropagator()
        self._open: dict[str, Call] = {}  # by the request's id; of two calls with one id the first
        self._ended: dict[str, _Generation] = {}
        self.model_id = ""

    def stop(self) -> None:
        """Hands over what is left. Blocks, for as long as an export may take."""
        self._provider.shutdown()

    def call_begun(self, call: Call) -> None:
        if call.request_id:
            self._open.setdefault(call.request_id, call)

    def step_done(self, sequences: AnySequence[Sequence], output: StepOutput, now: float) -> None:
        """Nothing: a step belongs to many requests."""

    def request_ended(self, ticket: Ticket, end: FinishedEvent | HotgraphError, now: float) -> None:
        request_id = ticket.request.request_id
        if request_id not in self._open:
            return
        times = [s.first_token_time for s in ticket.sequences if s.first_token_time is not None]
        self._ended[request_id] = _Generation(
            request=ticket.request,
            end=end,
            accept_time=ticket.accept_time,
            graphs_ready_time=ticket.graphs_ready_time,
            first_step_time=ticket.first_step_time,
            first_token_time=min(times, default=None),
            end_time=now,
            num_completion_tokens=sum(sequence.num_completion_tokens for sequence in ticket.sequences),
            num_cached_tokens=ticket.sequences[0].num_cached_tokens or 0,
        )

    def call_ended(self, call: Call) -> None:
        generation = None
        if self._open.get(call.request_id) is call:
            del self._open[call.request_id]
            generation = self._ended.pop(call.request_id, None)
        service, _, method = call.method.removeprefix("/").partition("/")
        offset = time.time_ns() - int(time.monotonic() * NANOSECONDS)

        def at(seconds: float) -> int:
            return int(seconds * NANOSECONDS) + offset

        span = self._tracer.start_span(
            f"{service}/{method}",
            context=self._propagator.extract(call.trace_context),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
            start_time=at(call.begin_time),
        )
        if span.is_recording():
            self._describe(span, call)
            if generation is not None:
                span.set_attributes(self._attributes(generation))
                for name, begin, end in _parts(generation):
                    part = self._tracer.start_span(name, context=set_span_in_context(span), start_time=at(begin))
                    part.end(end_time=at(end))
        span.end(end_time=at(call.end_time))

    @staticmethod
    def _describe(span: Span, call: Call) -> None:
        if call.code in GRPC_CODES:
            span.set_attribute("rpc.grpc.status_code", GRPC_CODES[call.code])
        span.set_attribute("rpc.response.status_code", call.code)
        if call.request_id:
            span.set_attribute("gen_ai.response.id", call.request_id)
        if call.reason:
            span.set_attribute("error.type", call.reason)
        if call.code in SERVER_ERRORS:
            span.set_status(Status(StatusCode.ERROR, call.reason))

    def _attributes(self, generation: _Generation) -> dict[str, Any]:
        request, end = generation.request, generation.end
        sampling = request.sampling
        found: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "hotgraph",
            "gen_ai.request.model": self.model_id,
            "gen_ai.response.model": self.model_id,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.choice.count": request.num_choices,
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.output_tokens": generation.num_completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": generation.num_cached_tokens,
        }
        if isinstance(end, FinishedEvent):
            found["gen_ai.response.finish_reasons"] = [choice.reason.value for choice in end.choices]
            found["hotgraph.graph_steps"] = end.receipt.num_graph_steps
            found["hotgraph.eager_steps"] = end.receipt.num_eager_steps
            found["hotgraph.preemptions"] = end.receipt.num_preemptions
        else:
            found["gen_ai.response.finish_reasons"] = [end.reason.lower()]
        return found


def _parts(generation: _Generation) -> list[tuple[str, float, float]]:
    """What the request did from its arrival to its end, without gaps: name, begin and end of each part that it came to."""
    marks = (
        ("capture wait", generation.graphs_ready_time),
        ("queue", generation.first_step_time),
        ("prefill", generation.first_token_time),
        ("decode", generation.end_time),
    )
    parts: list[tuple[str, float, float]] = []
    begin = generation.accept_time
    for index, (name, end) in enumerate(marks):
        if end is None and index == 0:
            continue  # it did not ask to wait for graphs
        parts.append((name, begin, generation.end_time if end is None else end))
        if end is None:
            break
        begin = end
    return parts
