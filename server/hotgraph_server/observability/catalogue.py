"""Every metric of ours there is: name, type, labels, unit and meaning. Nothing is exposed that does not stand here.

Names follow OpenMetrics: base units, `_total` of counters (which is not part of the name here). What Prometheus's own library
tells of the process and of Python (`process_*`, `python_*`) comes besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram", "info"]

# From a replay on a large GPU to a long wait on a CPU.
SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
# Between two tokens, and of one step: finer where GPUs are.
STEP_SECONDS: Final = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
TOKENS: Final = tuple(float(1 << power) for power in range(18))
ROWS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0, 512.0, 1024.0)
RATIOS: Final = (1.0, 1.05, 1.1, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` without the ending that a type brings along. `bounds` are a histogram's."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    bounds: tuple[float, ...] = ()

    @property
    def exposed_name(self) -> str:
        """As queries name it; of a histogram, what `_bucket`, `_sum` and `_count` follow."""
        return self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")


def _seconds(name: str, meaning: str, *labels: str, bounds: tuple[float, ...] = SECONDS) -> Metric:
    return Metric(f"hotgraph_{name}_seconds", "histogram", meaning, labels, "seconds", bounds)


def _counter(name: str, meaning: str, *labels: str, unit: str = "") -> Metric:
    return Metric(f"hotgraph_{name}", "counter", meaning, labels, unit)


def _gauge(name: str, meaning: str, *labels: str, unit: str = "") -> Metric:
    return Metric(f"hotgraph_{name}", "gauge", meaning, labels, unit)


_ALL: Final = (
    # A request, as its caller feels it.
    _seconds("time_to_first_token", "From a request's arrival at the scheduler to its first token"),
    _seconds("inter_token_latency", "Between two tokens of one choice, as steps bring them", bounds=STEP_SECONDS),
    _seconds(
        "time_per_output_token", "Of each finished request: (last token - first) / (tokens - 1)", bounds=STEP_SECONDS
    ),
    _seconds("request_queue", "From arrival to the first step; to the end, of requests that never ran"),
    _seconds("request_prefill", "From a request's first step to its first token"),
    _seconds("request_decode", "From a finished request's first token to its last"),
    _seconds("request_duration", "From arrival to the end, whatever it was"),
    Metric("hotgraph_request_prompt_tokens", "histogram", "Prompt tokens of a request", (), "tokens", TOKENS),
    Metric("hotgraph_request_generation_tokens", "histogram", "Completion tokens of a request", (), "tokens", TOKENS),
    # Requests.
    _counter("requests", "Requests that were taken into the queue"),
    _counter("requests_rejected", "Requests that were refused because the queue was full"),
    _counter("requests_ended", "Requests that ended: stop, length, or the reason of their error", "reason"),
    _gauge("sequences_running", "Sequences (choices of requests) that hold a slot"),
    _gauge("sequences_waiting", "Sequences that wait for a slot"),
    _gauge("slots", "Sequences that may run at once"),
    _gauge("queue_limit", "Sequences that may wait"),
    _counter("preemptions", "Sequences that had to give their slot back because KV blocks ran out"),
    # Tokens and the KV cache.
    _counter(
        "prompt_tokens", "Prompt tokens computed by steps; those found in the prefix cache are not", unit="tokens"
    ),
    _counter("generation_tokens", "Completion tokens sampled", unit="tokens"),
    _counter("prefix_cache_query_tokens", "Prompt tokens looked for in the prefix cache", unit="tokens"),
    _counter("prefix_cache_hit_tokens", "Prompt tokens found there", unit="tokens"),
    _gauge("kv_blocks", "KV blocks: used by sequences, cached for later, free", "state"),
    _gauge("kv_blocks_limit", "KV blocks in all"),
    _gauge("kv_block_tokens", "Token positions of a block", unit="tokens"),
    _gauge("kv_cache_bytes", "Bytes of the KV cache", unit="bytes"),
    # Steps of the engine.
    _seconds(
        "step_duration",
        "One step of the engine; phase is prefill, decode or mixed, mode is graph or eager",
        "phase",
        "mode",
        bounds=STEP_SECONDS,
    ),
    Metric("hotgraph_step_rows", "histogram", "Sequences in a step, its batch size", (), "", ROWS),
    Metric(
        "hotgraph_step_padding_ratio",
        "histogram",
        "Tokens of the bucket that a step ran in, over its own",
        (),
        "ratio",
        RATIOS,
    ),
    _counter("step_tokens", "Tokens that steps were asked to compute", unit="tokens"),
    _counter("step_padding_tokens", "Tokens that the steps' buckets had besides", unit="tokens"),
    # The graph cache.
    _counter("graph_hits", "Steps that replayed a graph"),
    _counter("graph_misses", "Steps whose graph was not there"),
    _counter("graph_captures", "Graphs captured and published"),
    _counter("graph_capture_failures", "Captures that failed and are tried again later"),
    _counter("graph_quarantines", "Graphs that gave other results than eager steps, and are not used"),
    _counter("graph_evictions", "Graphs thrown out of the budget"),
    _seconds("graph_capture", "Parts of a published capture; part is queue, record, instantiate or verify", "part"),
    _counter(
        "graph_stall_seconds",
        "Time of captures while requests were served, as charged to the stall budget: at most what they held up",
        unit="seconds",
    ),
    _gauge("graph_stall_budget_ratio", "Seconds of captures allowed for each second of serving", unit="ratio"),
    _gauge("graphs", "Graphs by state: ready, or pending (queued and captured now)", "state"),
    _gauge("graph_bytes", "Bytes that ready graphs hold", unit="bytes"),
    _gauge("graph_budget_bytes", "Bytes that they may hold", unit="bytes"),
    _gauge("graph_pool_bytes", "Bytes of the memory that graphs share, which stays when they go", unit="bytes"),
    _gauge("graph_device_lost", "1 when captures have found the device lost"),
    # Calls.
    _counter("rpc_calls", "Calls of our services that ended, by method and gRPC code", "method", "code"),
    _counter("rpc_errors", "Calls that failed, by the reason in their details", "reason"),
    _seconds("rpc_duration", "Calls from their headers to their last word", "method"),
    _gauge("rpc_in_flight", "Calls of our services that go on"),
    # Clients: those that declared an id or proved who they are, as many as the settings allow; the rest is "(other)".
    _counter("client_requests", "Requests that ended, by client", "client"),
    _counter("client_prompt_tokens", "Their prompt tokens", "client", unit="tokens"),
    _counter("client_generation_tokens", "Their completion tokens", "client", unit="tokens"),
    # The daemon.
    _gauge("state", "1 for the state that the daemon is in: starting, serving, draining, stopped", "state"),
    _gauge("failed", "1 when the engine has failed and the process is about to end"),
    _seconds("event_loop_lag", "How much later than asked the event loop came round", bounds=SECONDS),
    _counter("requests_quarantined", "Requests refused because the daemon had died at the same request twice"),
    _gauge("crash_suspects", "Requests that ran when the daemon died, and are on trial when they come again"),
    _counter("log_lines_lost", "Log lines that were lost because nobody read them in time"),
    _counter("log_lines_summed", "Log lines of bursts, of which only the number was written"),
    Metric("hotgraph_build", "info", "Versions", ("version", "python", "grpc")),
    Metric("hotgraph_model", "info", "The model served", ("model", "architecture", "dtype", "device", "runner")),
)

METRICS: Final = MappingProxyType({metric.name: metric for metric in _ALL})
