"""What a run gave: its samples summed up. It knows no gRPC and prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hotgraph_server.bench.sample import Sample
from hotgraph_server.bench.summary import Summary, summarize

_LATE_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Throughput:
    """Of the requests that went well, over the time from the first arrival to the last end of any request."""

    seconds: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int

    def _per_second(self, count: int) -> float:
        return count / self.seconds if self.seconds > 0 else 0.0

    @property
    def requests_per_second(self) -> float:
        return self._per_second(self.num_requests)

    @property
    def output_tokens_per_second(self) -> float:
        return self._per_second(self.num_output_tokens)

    @property
    def total_tokens_per_second(self) -> float:
        return self._per_second(self.num_prompt_tokens + self.num_output_tokens)


@dataclass(frozen=True, slots=True)
class Result:
    """Latencies in seconds by name, each None when nothing was measured; failures by reason; what to be wary of."""

    latencies: dict[str, Summary | None]
    throughput: Throughput
    num_requests: int
    errors: dict[str, int]
    error_examples: dict[str, str]
    num_cached_prompt_tokens: int
    num_graph_steps: int
    num_eager_steps: int
    num_preemptions: int
    num_shared_events: int
    warnings: tuple[str, ...]

    @property
    def num_ok(self) -> int:
        return self.throughput.num_requests

    @property
    def num_failed(self) -> int:
        return self.num_requests - self.num_ok

    def to_dict(self) -> dict[str, Any]:
        """For JSON; see `bench/README.md`."""
        return {
            "num_requests": self.num_requests,
            "num_ok": self.num_ok,
            "num_failed": self.num_failed,
            "errors": self.errors,
            "error_examples": self.error_examples,
            "seconds": self.throughput.seconds,
            "num_prompt_tokens": self.throughput.num_prompt_tokens,
            "num_output_tokens": self.throughput.num_output_tokens,
            "requests_per_second": self.throughput.requests_per_second,
            "output_tokens_per_second": self.throughput.output_tokens_per_second,
            "total_tokens_per_second": self.throughput.total_tokens_per_second,
            "latencies_seconds": {
                name: None if summary is None else summary.to_dict() for name, summary in self.latencies.items()
            },
            "num_cached_prompt_tokens": self.num_cached_prompt_tokens,
            "num_graph_steps": self.num_graph_steps,
            "num_eager_steps": self.num_eager_steps,
            "num_preemptions": self.num_preemptions,
            "num_shared_events": self.num_shared_events,
            "warnings": list(self.warnings),
        }


def evaluate(samples: Sequence[Sample]) -> Result:
    """Sums a run up. Latencies and tokens are those of requests that went well; failures only count as failures."""
    ok = [sample for sample in samples if sample.is_ok]
    views = [sample.server for sample in ok if sample.server is not None]
    latencies = {
        "ttft": summarize([t for sample in ok if (t := sample.time_to_first_token) is not None]),
        "tpot": summarize([t for sample in ok if (t := sample.time_per_output_token) is not None]),
        "itl": summarize([gap for sample in ok for gap in sample.inter_token_latencies]),
        "end_to_end": summarize([sample.end_to_end for sample in ok]),
        "server_ttft": summarize([view.time_to_first_token_seconds for view in views]),
        "server_queue": summarize([view.queue_seconds for view in views]),
        "server_prefill": summarize([view.prefill_seconds for view in views]),
        "lag": summarize([sample.lag for sample in samples]),
    }
    errors = Counter(sample.error for sample in samples if not sample.is_ok)
    examples = {sample.error: sample.error_message for sample in reversed(samples) if not sample.is_ok}
    num_cached = sum(view.num_cached_prompt_tokens for view in views)
    return Result(
        latencies=latencies,
        throughput=_throughput(samples, ok),
        num_requests=len(samples),
        errors=dict(errors.most_common()),
        error_examples=examples,
        num_cached_prompt_tokens=num_cached,
        num_graph_steps=sum(view.num_graph_steps for view in views),
        num_eager_steps=sum(view.num_eager_steps for view in views),
        num_preemptions=sum(view.num_preemptions for view in views),
        num_shared_events=sum(sample.num_events < sample.num_output_tokens for sample in ok),
        warnings=_warnings(latencies["lag"], len(samples), len(ok), num_cached),
    )


def _throughput(samples: Sequence[Sample], ok: Sequence[Sample]) -> Throughput:
    seconds = max(s.end for s in samples) - min(s.scheduled for s in samples) if samples else 0.0
    num_prompt_tokens = sum(sample.num_prompt_tokens for sample in ok)
    return Throughput(seconds, len(ok), num_prompt_tokens, sum(sample.num_output_tokens for sample in ok))


def _warnings(lag: Summary | None, num_requests: int, num_ok: int, num_cached: int) -> tuple[str, ...]:
    warnings = []
    if num_ok < num_requests:
        warnings.append(
            f"{num_requests - num_ok} of {num_requests} requests failed: latencies and tokens/s are of the others only"
        )
    if lag is not None and lag.p99 > _LATE_SECONDS:
        warnings.append(
            f"the load generator itself was late (p99 {lag.p99 * 1e3:.1f} ms): latencies include it; use a lower load "
            "or another machine for the bench"
        )
    if num_cached:
        warnings.append(f"{num_cached} prompt tokens came from the prefix cache: TTFT is lower than of fresh prompts")
    if 0 < num_ok < 100:
        warnings.append(f"with {num_ok} requests the p99 is little more than the largest value")
    return tuple(warnings)
