"""The page that a scrape reads: all that the catalogue has, what requests leave there, and nothing of what users wrote."""

from __future__ import annotations

import asyncio
import io
import logging
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families

from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest, TokenizeRequest
from hotgraph_server.config import LoggingSettings, MetricsSettings
from hotgraph_server.engine import FakeEngine
from hotgraph_server.logs import logging_to
from hotgraph_server.observability.catalogue import METRICS, Metric
from tests.integration.harness import eventually, letters, refused, serving
from tests.server.observability.scraping import OPEN_METRICS, scrape

ROOT = Path(__file__).parents[3]
METRICS_ON = MetricsSettings(listen=("127.0.0.1:0",), max_clients=2)
MARKER = "xylophone-7261"


async def test_a_page_has_the_whole_catalogue() -> None:
    """Every metric is on the page, of its type and with no other labels than its own; the process tells of itself, too."""
    async with serving(metrics=METRICS_ON) as served:
        await served.inference.Complete(CompleteRequest(text="hello", max_tokens=4))
        page = await scrape(served.daemon.observability.addresses[0])
    parse: Any = text_string_to_metric_families  # has no types
    families = {family.name: family for family in parse(page.body)}
    ours = {name for name in families if name.startswith("hotgraph_")}
    # The plain format has no type of its own for an info.
    assert ours == {metric.exposed_name if metric.kind == "info" else name for name, metric in METRICS.items()}
    for metric in METRICS.values():
        family = families[metric.exposed_name if metric.kind == "info" else metric.name]
        assert family.type == ("gauge" if metric.kind == "info" else metric.kind)
        assert family.documentation == metric.meaning
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
    assert {"process_resident_memory_bytes", "process_open_fds", "python_info"} <= families.keys()


async def test_open_metrics() -> None:
    """Asked for OpenMetrics the page is OpenMetrics, which its own strict parser takes."""
    async with serving(metrics=METRICS_ON) as served:
        await served.inference.Complete(CompleteRequest(text="hello", max_tokens=4))
        page = await scrape(served.daemon.observability.addresses[0], accept=OPEN_METRICS)
    assert page.headers["content-type"].startswith("application/openmetrics-text")
    assert page.body.endswith("# EOF\n")
    parse: Any = parse_open_metrics  # has no types
    families = {family.name: family for family in parse(page.body)}
    assert set(METRICS) <= families.keys()
    assert all(families[name].type == metric.kind for name, metric in METRICS.items())


async def test_what_requests_leave() -> None:
    """Finished, cancelled, late and wrong requests, and their tokens, are counted as what they were."""
    async with serving(engine=FakeEngine(rule=letters, step_seconds=0.005), metrics=METRICS_ON) as served:
        me = (("x-client-id", "me"),)
        await served.inference.Complete(CompleteRequest(text="hello", max_tokens=6), metadata=me)
        call = served.inference.Generate(GenerateRequest(text="hello", max_tokens=500), metadata=me)
        async for event in call:
            if event.HasField("tokens"):
                break
        call.cancel()
        await refused(served.inference.Complete(CompleteRequest(text="hello", max_tokens=0)))
        await refused(served.inference.Complete(CompleteRequest(text="hello", max_tokens=900), timeout=0.05))
        await served.inference.Tokenize(TokenizeRequest(text="hello"))
        await eventually(served.is_all_free)
        await asyncio.sleep(0.3)  # handlers' last words, and a beat of the loop
        page = await scrape(served.daemon.observability.addresses[0])
        status = served.scheduler.status()
    cancelled, late = (
        page.value("hotgraph_requests_ended_total", reason=reason) for reason in ("cancelled", "deadline_exceeded")
    )
    assert page.value("hotgraph_requests_ended_total", reason="length") == 1
    assert cancelled >= 1
    assert cancelled + late == 2  # of a deadline the scheduler or the library hears first
    assert page.value("hotgraph_requests_total") == 3
    assert page.value("hotgraph_rpc_calls_total", method="Complete", code="INVALID_ARGUMENT") == 1
    assert page.value("hotgraph_rpc_errors_total", reason="INVALID_REQUEST") == 1
    assert page.value("hotgraph_rpc_calls_total", method="Generate", code="CANCELLED") == 1
    assert page.value("hotgraph_rpc_calls_total", method="Complete", code="DEADLINE_EXCEEDED") == 1
    assert page.value("hotgraph_rpc_calls_total", method="Tokenize", code="OK") == 1
    assert page.value("hotgraph_rpc_in_flight") == 0
    assert page.value("hotgraph_time_to_first_token_seconds_count") == 3
    assert page.value("hotgraph_generation_tokens_total") == status.num_completion_tokens
    assert page.value("hotgraph_prompt_tokens_total") == status.num_prompt_tokens
    gaps = page.value("hotgraph_inter_token_latency_seconds_count")
    assert gaps == status.num_completion_tokens - 3
    assert page.value("hotgraph_client_requests_total", client="me") == 2
    assert page.value("hotgraph_client_requests_total", client="(anonymous)") == 1
    assert page.value("hotgraph_state", state="serving") == 1
    assert page.value("hotgraph_event_loop_lag_seconds_count") > 0


async def test_no_text_of_users_anywhere() -> None:
    """A marker in prompts, stops, names and broken requests is in no log line at any level, no metric and no error's text."""
    stream = io.StringIO()
    texts: list[str] = []
    with logging_to(LoggingSettings(level="debug", format="json"), stream):
        async with serving(metrics=METRICS_ON) as served:
            marked = CompleteRequest(text=f"tell me of {MARKER}", max_tokens=4)
            marked.stop.strings.append(f"{MARKER} stop")
            await served.inference.Complete(marked)
            wrong = CompleteRequest(text=MARKER, max_tokens=0)
            wrong.sampling.temperature = -1
            long = CompleteRequest(text=MARKER * 1000, max_tokens=4)
            late = CompleteRequest(text=MARKER, max_tokens=900)
            late.timeout.nanos = 1
            for request in (wrong, long, late):
                error = await refused(served.inference.Complete(request))
                texts.append(repr(error))
            served.engine.fail_rows(len(served.engine.batches), [0])
            texts.append(repr(await refused(served.inference.Complete(marked))))
            texts.append((await scrape(served.daemon.observability.addresses[0])).body)
            served.engine.fail_step(len(served.engine.batches), RuntimeError("broken"))
            texts.append(repr(await refused(served.inference.Complete(marked))))
            await asyncio.sleep(0)
            logging.getLogger("hotgraph").info("the last line")
    log = stream.getvalue()
    assert "the last line" in log
    assert "call ended" in log
    assert MARKER not in log
    assert len(texts) == 6
    assert not [text for text in texts if MARKER in text]


@pytest.mark.parametrize("name", ["hotgraph-alerts.yml", "hotgraph-dashboard.json"])
def test_files_name_only_what_is_exposed(name: str) -> None:
    """Every metric in the dashboard and the alert rules is one that the daemon exposes; the dashboard shows all of ours."""
    text = (ROOT / "server/hotgraph_server/observability/files" / name).read_text()
    named = set(re.findall(r"\bhotgraph_\w+", text))
    exposed = {metric.exposed_name for metric in METRICS.values()}
    histograms = {metric.name for metric in METRICS.values() if metric.kind == "histogram"}
    suffixed = {f"{histogram}_{part}" for histogram in histograms for part in ("bucket", "sum", "count")}
    assert named, "the pattern finds none"
    assert named <= exposed | suffixed
    if name.endswith(".json"):
        shown = {re.sub(r"_bucket$", "", found) for found in named}
        assert exposed == shown


def row(metric: Metric) -> str:
    """The line of docs/observability.md that tells of this metric."""
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
    return f"| `{metric.exposed_name}` | {metric.kind} | {labels} | {metric.unit or 'none'} | {metric.meaning} |"


def test_the_page_of_the_docs_is_the_catalogue() -> None:
    """docs/observability.md has a line for every metric, as the code has it, and for no other."""
    lines = (ROOT / "docs/observability.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| `hotgraph_")] == [row(metric) for metric in METRICS.values()]


async def test_off_by_default() -> None:
    """Without metrics.listen nothing listens, nothing is counted and the scheduler has no observer."""
    async with serving() as served:
        assert served.daemon.observability.addresses == ()
        assert served.scheduler.observer is None


async def test_grpc_codes_are_all_known() -> None:
    """A label for codes holds names of gRPC's own, of which there are few."""
    async with serving(metrics=METRICS_ON) as served:
        await refused(served.inference.Complete(CompleteRequest(model="none", text="x")))
        page = await scrape(served.daemon.observability.addresses[0])
    codes = set(re.findall(r'code="(\w+)"', page.body))
    assert codes == {"NOT_FOUND"}
    assert codes <= {code.name for code in grpc.StatusCode}
