"""The page that a scrape reads, family by family: what everything stands at now, as the catalogue names it.

It knows where each number is to be had, and asks for it when the page is read: between scrapes it costs nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import grpc
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from hotgraph_server.errors import (
    CancelledRequestError,
    DeadlineError,
    DrainingError,
    EngineFailedError,
    InternalError,
    ServerTimeLimitError,
)
from hotgraph_server.logs import log_counts
from hotgraph_server.observability.calls import CallMetrics
from hotgraph_server.observability.captures import PARTS, CaptureMetrics
from hotgraph_server.observability.catalogue import METRICS
from hotgraph_server.observability.distribution import Distribution
from hotgraph_server.observability.loop_lag import LoopLag
from hotgraph_server.observability.requests import RequestMetrics
from hotgraph_server.request import FinishReason
from hotgraph_server.rpc import DaemonState, Lifecycle, ServedModel

# They stand at 0 from the start, so that the first of their kind is a rise and not a new series.
END_REASONS = (
    FinishReason.STOP.value,
    FinishReason.LENGTH.value,
    *(
        kind.reason.lower()
        for kind in (
            CancelledRequestError,
            DeadlineError,
            ServerTimeLimitError,
            DrainingError,
            EngineFailedError,
            InternalError,
        )
    ),
)
# What cannot be told before the model is loaded; the families are there all the same.
SCHEDULER_METRICS = (
    "hotgraph_requests",
    "hotgraph_requests_rejected",
    "hotgraph_sequences_running",
    "hotgraph_sequences_waiting",
    "hotgraph_slots",
    "hotgraph_queue_limit",
    "hotgraph_preemptions",
    "hotgraph_prompt_tokens",
    "hotgraph_generation_tokens",
    "hotgraph_kv_blocks_limit",
    "hotgraph_kv_block_tokens",
    "hotgraph_kv_cache_bytes",
)
GRAPH_METRICS = (
    "hotgraph_graph_hits",
    "hotgraph_graph_misses",
    "hotgraph_graph_captures",
    "hotgraph_graph_capture_failures",
    "hotgraph_graph_quarantines",
    "hotgraph_graph_evictions",
    "hotgraph_graph_stall_seconds",
    "hotgraph_graph_stall_budget_ratio",
    "hotgraph_graph_bytes",
    "hotgraph_graph_budget_bytes",
    "hotgraph_graph_pool_bytes",
    "hotgraph_graph_device_lost",
)
ERROR_REASONS = ("INTERNAL", "QUEUE_FULL", "ENGINE_FAILED", "UNAUTHENTICATED", "PERMISSION_DENIED")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the numbers are."""

    lifecycle: Lifecycle
    requests: RequestMetrics
    calls: CallMetrics
    captures: CaptureMetrics
    loop_lag: LoopLag
    num_calls_in_flight: Callable[[], int]


class Page:
    """Made once. `families` is for the event loop's thread."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        process = CollectorRegistry(auto_describe=False)
        self._standard = (ProcessCollector(registry=process), PlatformCollector(registry=process), GCCollector(process))

    def families(self) -> Iterator[Metric]:
        """All metrics, one after the other, each as it stands when it is asked for."""
        sources = self._sources
        yield from self._requests()
        served = sources.lifecycle.served
        yield from self._scheduler(served)
        yield from self._steps()
        yield from self._graphs(served)
        yield from self._calls()
        yield from self._clients()
        yield from self._daemon(served)
        for collector in self._standard:
            yield from collector.collect()

    def _requests(self) -> Iterator[Metric]:
        requests = self._sources.requests
        yield _histogram("hotgraph_time_to_first_token_seconds", requests.time_to_first_token)
        yield _histogram("hotgraph_inter_token_latency_seconds", requests.inter_token_latency)
        yield _histogram("hotgraph_time_per_output_token_seconds", requests.time_per_output_token)
        yield _histogram("hotgraph_request_queue_seconds", requests.queue)
        yield _histogram("hotgraph_request_prefill_seconds", requests.prefill)
        yield _histogram("hotgraph_request_decode_seconds", requests.decode)
        yield _histogram("hotgraph_request_duration_seconds", requests.duration)
        yield _histogram("hotgraph_request_prompt_tokens", requests.prompt_tokens)
        yield _histogram("hotgraph_request_generation_tokens", requests.generation_tokens)
        yield _values("hotgraph_requests_ended", dict.fromkeys(END_REASONS, 0) | requests.num_ended)
        yield _value("hotgraph_prefix_cache_query_tokens", requests.num_query_tokens)
        yield _value("hotgraph_prefix_cache_hit_tokens", requests.num_hit_tokens)

    @staticmethod
    def _scheduler(served: ServedModel | None) -> Iterator[Metric]:
        blocks: dict[str, float] = {}
        values: dict[str, float] = {}
        if served is not None:
            status = served.scheduler.status()
            kv_cache = status.kv_cache
            blocks = {
                "used": kv_cache.num_used_blocks,
                "cached": kv_cache.num_cached_blocks,
                "free": kv_cache.num_free_blocks,
            }
            values = {
                "hotgraph_requests": status.num_requests,
                "hotgraph_requests_rejected": status.num_rejected,
                "hotgraph_sequences_running": status.num_running,
                "hotgraph_sequences_waiting": status.num_waiting,
                "hotgraph_slots": status.num_slots,
                "hotgraph_queue_limit": status.max_waiting,
                "hotgraph_preemptions": status.num_preemptions,
                "hotgraph_prompt_tokens": status.num_prompt_tokens,
                "hotgraph_generation_tokens": status.num_completion_tokens,
                "hotgraph_kv_blocks_limit": kv_cache.num_blocks,
                "hotgraph_kv_block_tokens": kv_cache.block_size,
                "hotgraph_kv_cache_bytes": kv_cache.size_bytes,
            }
        yield from (_value(name, values.get(name)) for name in SCHEDULER_METRICS)
        yield _values("hotgraph_kv_blocks", blocks)

    def _steps(self) -> Iterator[Metric]:
        requests = self._sources.requests
        steps: dict[tuple[str, ...], Distribution] = {
            (phase.value, "graph" if is_graph else "eager"): step
            for (phase, is_graph), step in sorted(
                requests.steps.items(), key=lambda item: (item[0][0].value, item[0][1])
            )
        }
        yield _histograms("hotgraph_step_duration_seconds", steps)
        yield _histogram("hotgraph_step_rows", requests.rows)
        yield _histogram("hotgraph_step_padding_ratio", requests.padding_ratio)
        yield _value("hotgraph_step_tokens", requests.num_step_tokens)
        yield _value("hotgraph_step_padding_tokens", requests.num_padding_tokens)

    def _graphs(self, served: ServedModel | None) -> Iterator[Metric]:
        states: dict[str, float] = {}
        values: dict[str, float] = {}
        if served is not None:
            cache = served.engine.graphs
            stats = cache.stats()
            states = {"ready": stats.num_ready, "pending": stats.num_pending}
            values = {
                "hotgraph_graph_hits": stats.num_hits,
                "hotgraph_graph_misses": stats.num_misses,
                "hotgraph_graph_captures": stats.num_captures,
                "hotgraph_graph_capture_failures": stats.num_failures - stats.num_quarantines,
                "hotgraph_graph_quarantines": stats.num_quarantines,
                "hotgraph_graph_evictions": stats.num_evictions,
                "hotgraph_graph_stall_seconds": stats.stall_seconds,
                "hotgraph_graph_stall_budget_ratio": stats.stall_budget_seconds,
                "hotgraph_graph_bytes": stats.used_bytes,
                "hotgraph_graph_budget_bytes": stats.limit_bytes,
                "hotgraph_graph_pool_bytes": stats.pool_bytes,
                "hotgraph_graph_device_lost": cache.lost is not None,
            }
        yield from (_value(name, values.get(name)) for name in GRAPH_METRICS)
        yield _values("hotgraph_graphs", states)
        parts = self._sources.captures.durations
        yield _histograms("hotgraph_graph_capture_seconds", {(part,): parts[part] for part in PARTS})

    def _calls(self) -> Iterator[Metric]:
        calls = self._sources.calls
        yield _values("hotgraph_rpc_calls", calls.num_calls)
        yield _values("hotgraph_rpc_errors", dict.fromkeys(ERROR_REASONS, 0) | calls.num_errors)
        yield _histograms(
            "hotgraph_rpc_duration_seconds", {(method,): duration for method, duration in calls.durations.items()}
        )
        yield _value("hotgraph_rpc_in_flight", self._sources.num_calls_in_flight())

    def _clients(self) -> Iterator[Metric]:
        clients = self._sources.requests.clients
        yield _values("hotgraph_client_requests", clients.num_requests)
        yield _values("hotgraph_client_prompt_tokens", clients.num_prompt_tokens)
        yield _values("hotgraph_client_generation_tokens", clients.num_completion_tokens)

    def _daemon(self, served: ServedModel | None) -> Iterator[Metric]:
        lifecycle = self._sources.lifecycle
        yield _values("hotgraph_state", {state.value: state is lifecycle.state for state in DaemonState})
        yield _value("hotgraph_failed", lifecycle.failure is not None)
        yield _histogram("hotgraph_event_loop_lag_seconds", self._sources.loop_lag.lag)
        quarantine = None if served is None else served.scheduler.quarantine
        yield _value("hotgraph_requests_quarantined", 0 if quarantine is None else quarantine.num_refused)
        yield _value("hotgraph_crash_suspects", 0 if quarantine is None else quarantine.num_suspects)
        counts = log_counts()
        yield _value("hotgraph_log_lines_lost", counts.num_lost)
        yield _value("hotgraph_log_lines_summed", counts.num_summed)
        versions = (version("hotgraph"), platform.python_version(), grpc.__version__)
        yield _info("hotgraph_build", versions)
        yield _info(
            "hotgraph_model",
            None
            if served is None
            else (
                served.model_id,
                served.info.architecture,
                served.info.dtype,
                served.info.device,
                served.info.runner,
            ),
        )


def _values(name: str, values: Mapping[str, float] | Mapping[tuple[str, str], int]) -> Metric:
    """A counter or gauge with labels."""
    metric = METRICS[name]
    family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
        name, metric.meaning, labels=metric.labels, unit=_unit_of(name, metric.unit)
    )
    for labels, value in values.items():
        family.add_metric([labels] if isinstance(labels, str) else labels, float(value))
    return family


def _value(name: str, value: float | None) -> Metric:
    """A counter or gauge without; None: it cannot be told yet."""
    metric = METRICS[name]
    family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
        name, metric.meaning, labels=(), unit=_unit_of(name, metric.unit)
    )
    if value is not None:
        family.add_metric((), float(value))
    return family


def _histogram(name: str, values: Distribution) -> Metric:
    return _histograms(name, {(): values})


def _histograms(name: str, by_labels: Mapping[tuple[str, ...], Distribution]) -> Metric:
    metric = METRICS[name]
    family = HistogramMetricFamily(name, metric.meaning, labels=metric.labels, unit=_unit_of(name, metric.unit))
    for labels, values in by_labels.items():
        family.add_metric(labels, values.buckets(), values.total)
    return family


def _info(name: str, values: tuple[str, ...] | None) -> Metric:
    metric = METRICS[name]
    family = InfoMetricFamily(name, metric.meaning)
    if values is not None:
        family.add_metric((), dict(zip(metric.labels, values, strict=True)))
    return family


def _unit_of(name: str, unit: str) -> str:
    """The unit as the format wants it: only where the name ends with it, or the library would add it to the name."""
    return unit if name.endswith(f"_{unit}") else ""
