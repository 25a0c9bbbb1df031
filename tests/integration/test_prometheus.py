"""A real Prometheus scrapes a real daemon: its rules are valid, its alerts fire on faults that are provoked, and not before.

Skipped where there is none, and `tests/smoke/install_prometheus.sh` could not fetch it.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from hotgraph.v1.inference_service_pb2 import CompleteRequest
from hotgraph_server.config import MetricsSettings
from hotgraph_server.engine import FakeEngine
from tests.integration.harness import Serving, eventually, letters, refused, serving
from tests.integration.prometheus import (
    FILES,
    PATIENCE_SECONDS,
    Prometheus,
    fires,
    needs_prometheus,
    prometheus,
    promtool,
)


@needs_prometheus
def test_rules_and_example_are_valid() -> None:
    """promtool takes the rules and the example of a configuration."""
    assert "SUCCESS" in promtool("check", "rules", FILES / "hotgraph-alerts.yml")
    promtool("check", "config", FILES / "prometheus.yml")


CASES: list[tuple[str, list[tuple[str, str]], str]] = [
    ("HotgraphDown", [('up{job="hotgraph", instance="a"}', "1 1 0x20")], "5m"),
    ("HotgraphNotServing", [('hotgraph_state{state="serving", instance="a"}', "0x20")], "8m"),
    ("HotgraphEngineFailed", [('hotgraph_failed{instance="a"}', "0 1")], "1m"),
    (
        "HotgraphRestarts",
        [('process_start_time_seconds{job="hotgraph", instance="a"}', "1 1 2 3 4 4 4")],
        "6m",
    ),
    (
        "HotgraphEventLoopBlocked",
        [
            ('hotgraph_event_loop_lag_seconds_bucket{instance="a", le="0.25"}', "0+590x20"),
            ('hotgraph_event_loop_lag_seconds_bucket{instance="a", le="2.5"}', "0+600x20"),
            ('hotgraph_event_loop_lag_seconds_bucket{instance="a", le="+Inf"}', "0+600x20"),
        ],
        "10m",
    ),
    ("HotgraphLogLinesLost", [('hotgraph_log_lines_lost_total{instance="a"}', "0 0 5 5")], "3m"),
    (
        "HotgraphFileDescriptors",
        [
            ('process_open_fds{job="hotgraph", instance="a"}', "900x20"),
            ('process_max_fds{job="hotgraph", instance="a"}', "1000x20"),
        ],
        "8m",
    ),
    ("HotgraphRequestsRejected", [('hotgraph_requests_rejected_total{instance="a"}', "0+1x20")], "6m"),
    ("HotgraphInternalErrors", [('hotgraph_rpc_errors_total{instance="a", reason="INTERNAL"}', "0 0 1 1")], "3m"),
    (
        "HotgraphErrorRatio",
        [
            ('hotgraph_requests_ended_total{instance="a", reason="internal"}', "0+2x30"),
            ('hotgraph_requests_ended_total{instance="a", reason="stop"}', "0+98x30"),
        ],
        "15m",
    ),
    (
        "HotgraphDeadlines",
        [
            ('hotgraph_requests_ended_total{instance="a", reason="deadline_exceeded"}', "0+10x60"),
            ('hotgraph_requests_ended_total{instance="a", reason="stop"}', "0+90x60"),
        ],
        "30m",
    ),
    (
        "HotgraphSlowFirstTokens",
        [
            ('hotgraph_time_to_first_token_seconds_bucket{instance="a", le="2.5"}', "0x30"),
            ('hotgraph_time_to_first_token_seconds_bucket{instance="a", le="5.0"}', "0+60x30"),
            ('hotgraph_time_to_first_token_seconds_bucket{instance="a", le="+Inf"}', "0+60x30"),
        ],
        "15m",
    ),
    (
        "HotgraphSlowTokens",
        [
            ('hotgraph_inter_token_latency_seconds_bucket{instance="a", le="0.25"}', "0+50x30"),
            ('hotgraph_inter_token_latency_seconds_bucket{instance="a", le="0.5"}', "0+60x30"),
            ('hotgraph_inter_token_latency_seconds_bucket{instance="a", le="+Inf"}', "0+60x30"),
        ],
        "15m",
    ),
    (
        "HotgraphQueueLong",
        [('hotgraph_sequences_waiting{instance="a"}', "90x20"), ('hotgraph_queue_limit{instance="a"}', "100x20")],
        "5m",
    ),
    (
        "HotgraphAccessRefused",
        [('hotgraph_rpc_errors_total{instance="a", reason="UNAUTHENTICATED"}', "0+30x20")],
        "5m",
    ),
    ("HotgraphPreemptions", [('hotgraph_preemptions_total{instance="a"}', "0+60x60")], "30m"),
    (
        "HotgraphKvCacheFull",
        [
            ('hotgraph_kv_blocks{instance="a", state="used"}', "99x30"),
            ('hotgraph_kv_blocks{instance="a", state="free"}', "1x30"),
            ('hotgraph_kv_blocks_limit{instance="a"}', "100x30"),
        ],
        "15m",
    ),
    ("HotgraphGraphQuarantined", [('hotgraph_graph_quarantines_total{instance="a"}', "0 0 1 1")], "3m"),
    ("HotgraphCaptureFailures", [('hotgraph_graph_capture_failures_total{instance="a"}', "0+2x20")], "10m"),
    (
        "HotgraphFewReplays",
        [
            ('hotgraph_graph_hits_total{instance="a"}', "0+10x90"),
            ('hotgraph_graph_misses_total{instance="a"}', "0+90x90"),
        ],
        "60m",
    ),
    (
        "HotgraphCaptureStall",
        [
            ('hotgraph_graph_stall_seconds_total{instance="a"}', "0+12x60"),
            ('hotgraph_graph_stall_budget_ratio{instance="a"}', "0.05x60"),
        ],
        "40m",
    ),
]
QUIET = [  # a daemon that is well and busy: nothing may fire
    ('up{job="hotgraph", instance="a"}', "1x90"),
    ('hotgraph_state{state="serving", instance="a"}', "1x90"),
    ('hotgraph_failed{instance="a"}', "0x90"),
    ('hotgraph_graph_device_lost{instance="a"}', "0x90"),
    ('process_start_time_seconds{job="hotgraph", instance="a"}', "1x90"),
    ('hotgraph_requests_ended_total{instance="a", reason="stop"}', "0+100x90"),
    ('hotgraph_requests_ended_total{instance="a", reason="internal"}', "0x90"),
    ('hotgraph_requests_ended_total{instance="a", reason="deadline_exceeded"}', "0+1x90"),
    ('hotgraph_rpc_errors_total{instance="a", reason="INTERNAL"}', "0x90"),
    ('hotgraph_rpc_errors_total{instance="a", reason="UNAUTHENTICATED"}', "0+1x90"),
    ('hotgraph_graph_hits_total{instance="a"}', "0+900x90"),
    ('hotgraph_graph_misses_total{instance="a"}', "0+50x90"),
    ('hotgraph_graph_stall_seconds_total{instance="a"}', "0+3x90"),
    ('hotgraph_graph_stall_budget_ratio{instance="a"}', "0.05x90"),
    ('hotgraph_sequences_waiting{instance="a"}', "10x90"),
    ('hotgraph_queue_limit{instance="a"}', "256x90"),
    ('hotgraph_kv_blocks{instance="a", state="used"}', "80x90"),
    ('hotgraph_kv_blocks_limit{instance="a"}', "100x90"),
    ('hotgraph_time_to_first_token_seconds_bucket{instance="a", le="0.5"}', "0+60x90"),
    ('hotgraph_time_to_first_token_seconds_bucket{instance="a", le="2.5"}', "0+60x90"),
    ('hotgraph_time_to_first_token_seconds_bucket{instance="a", le="+Inf"}', "0+60x90"),
]


def alerts_in_rules() -> set[str]:
    return set(re.findall(r"alert: (\w+)", (FILES / "hotgraph-alerts.yml").read_text()))


@needs_prometheus
def test_every_rule_fires_on_its_fault_and_on_nothing_else(tmp_path: Path) -> None:
    """promtool's own tests of rules: each alert fires for series that show its fault, and none for a daemon that is well."""
    assert {name for name, _, _ in CASES} == alerts_in_rules()
    tests = []
    for name, series, at in CASES:
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": key, "values": values} for key, values in series],
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}})',
                        "eval_time": at,
                        "exp_samples": [{"labels": "{}", "value": 1}],
                    },
                    {"expr": f'ALERTS{{alertname!="{name}", alertstate="firing"}}', "eval_time": at, "exp_samples": []},
                ],
            }
        )
    tests.append(
        {
            "interval": "1m",
            "input_series": [{"series": key, "values": values} for key, values in QUIET],
            "promql_expr_test": [
                {"expr": "ALERTS", "eval_time": at, "exp_samples": []} for at in ("10m", "40m", "80m")
            ],
        }
    )
    file = tmp_path / "tests.yml"  # JSON is YAML
    file.write_text(
        json.dumps({"rule_files": [str(FILES / "hotgraph-alerts.yml")], "evaluation_interval": "1m", "tests": tests})
    )
    assert "SUCCESS" in promtool("test", "rules", file)


@needs_prometheus
@pytest.mark.slow
async def test_alerts_of_a_real_daemon(tmp_path: Path) -> None:
    """Scraped by a real Prometheus a daemon that is well fires nothing; a full queue, broken logits, a wrong graph and the
    daemon's end each fire their alert."""
    engine = FakeEngine(rule=letters, num_slots=1, step_seconds=0.002)
    metrics = MetricsSettings(listen=("127.0.0.1:0",))
    scheduler = {"num_slots": 1, "max_waiting": 1}
    async with (
        serving(engine=engine, scheduler=scheduler, metrics=metrics) as served,
        prometheus(tmp_path, served.daemon.observability.addresses[0]) as server,
    ):
        for _ in range(3):
            await complete(served)
        await eventually(lambda: has_samples(server), PATIENCE_SECONDS)
        assert not await server.firing() - {"HotgraphEventLoopBlocked"}  # a machine that is loaded may do that
        flood = [complete(served, 400) for _ in range(12)]
        ends = await asyncio.gather(*flood, return_exceptions=True)
        assert sum(isinstance(end, Exception) for end in ends) > 5
        await fires(server, "HotgraphRequestsRejected")
        engine.fail_rows(len(engine.batches), [0])
        await refused(served.inference.Complete(CompleteRequest(text="hello", max_tokens=4)))
        await fires(server, "HotgraphInternalErrors", "HotgraphErrorRatio")
        for info in engine.graphs.list()[:1]:
            graph = engine.graphs.lookup(info.key)
            assert graph is not None
            engine.graphs.report_failure(graph, "asked for")
        await fires(server, "HotgraphGraphQuarantined")
        served.daemon.drain(0.0)
        await fires(server, "HotgraphDown")


async def complete(served: Serving, max_tokens: int = 20) -> None:
    await served.inference.Complete(CompleteRequest(text="hello", max_tokens=max_tokens))


async def has_samples(server: Prometheus) -> bool:
    return bool(await server.query('hotgraph_requests_total > 0 and up{job="hotgraph"} == 1'))
