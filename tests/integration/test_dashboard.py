"""The Grafana dashboard against a real Prometheus that scrapes a real daemon under load, as Grafana would ask for it.

Grafana itself is not here: its variables are put into the expressions as it does it. Skipped where there is no Prometheus.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.config import MetricsSettings
from hotgraph_server.engine import FakeEngine
from hotgraph_server.observability.catalogue import METRICS
from tests.integration.harness import Serving, eventually, letters, refused, serving
from tests.integration.prometheus import FILES, PATIENCE_SECONDS, Prometheus, needs_prometheus, prometheus

RATE_INTERVAL: Final = "5m"  # longer than the test, however slow the machine is
GAP_SECONDS: Final = 20.0
WITH_DATA_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
# At 0, or without a number, on a daemon with the fake engine that is well: nothing of the kind has happened, or it has none.
QUIET: Final = {
    "hotgraph_crash_suspects",
    "hotgraph_failed",
    "hotgraph_graph_bytes",
    "hotgraph_graph_capture_failures_total",
    "hotgraph_graph_device_lost",
    "hotgraph_graph_evictions_total",
    "hotgraph_graph_pool_bytes",
    "hotgraph_graph_quarantines_total",
    "hotgraph_graph_stall_seconds_total",
    "hotgraph_kv_cache_bytes",
    "hotgraph_log_lines_lost_total",
    "hotgraph_log_lines_summed_total",
    "hotgraph_preemptions_total",
    "hotgraph_requests_quarantined_total",
    "hotgraph_requests_rejected_total",
    "hotgraph_sequences_waiting",
    "hotgraph_step_padding_tokens_total",
}


class Target(NamedTuple):
    """A query of a panel."""

    panel: str
    expression: str
    legend: str

    @property
    def is_quiet(self) -> bool:
        return bool(set(re.findall(r"\bhotgraph_\w+", self.expression)) & QUIET)


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FILES / "hotgraph-dashboard.json").read_text())
    return found


def targets() -> Iterator[Target]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield Target(panel["title"], target["expr"], target["legendFormat"])


def variables() -> dict[str, Any]:
    return {variable["name"]: variable for variable in dashboard()["templating"]["list"]}


def filled(text: str, **values: str) -> str:
    """With these values for variables. Nothing may be left that stands for something."""
    for name, value in {**values, "__rate_interval": RATE_INTERVAL}.items():
        text = re.sub(rf"\$(?:{name}\b|\{{{name}\}})", lambda _, value=value: value, text)  # type: ignore[misc]
    assert "$" not in text, text
    return text


def chosen(*values: str) -> str:
    """What Grafana puts in for these values of a variable with several: a regular expression in a string of PromQL."""
    escaped = [re.sub(r"([.*+?^${}()|\[\]\\])", r"\\\\\1", value) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def test_every_panel_can_be_read() -> None:
    """Each panel has a title of its own, a description and a place that no other takes; each asks the data source that the
    reader has chosen, of the jobs and daemons chosen; and all variables are declared."""
    board = dashboard()
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len({panel["title"] for panel in panels}) == len(panels) > 40
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    for panel in panels:
        assert panel["description"], panel["title"]
        assert panel["datasource"] == WITH_DATA_SOURCE
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == WITH_DATA_SOURCE
            selectors = re.findall(r"\b(?:hotgraph|process|python)_\w+(\{[^}]*\})?", target["expr"])
            assert selectors, panel["title"]
            for selector in selectors:
                assert 'job=~"$job"' in selector, panel["title"]
                assert 'instance=~"$instance"' in selector, panel["title"]
    named = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
    assert named - {"__all", "__rate_interval"} == variables().keys() == {"datasource", "job", "instance"}


async def values_of(server: Prometheus, name: str, **values: str) -> list[str]:
    """The values of a variable of the dashboard, as Grafana finds them."""
    query = filled(variables()[name]["query"]["query"], **values)
    asked = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    assert asked, query
    return await server.label_values(asked[2], asked[1])


async def load(served: Serving, is_over: asyncio.Event) -> None:
    """Calls of all kinds of which a panel tells, and a stream all the time, until it is over.

    Not until it is cancelled: a call of grpc.aio may take that for its own, and all would go on.
    """

    async def stream() -> None:
        while not is_over.is_set():
            async for _ in served.inference.Generate(GenerateRequest(text="x", max_tokens=500)):
                pass

    async with asyncio.TaskGroup() as group:
        group.create_task(stream())
        for length in itertools.cycle(range(30)):
            if is_over.is_set():
                return
            text = "the same beginning of every prompt, for the prefix cache, and then " + "x" * length
            call = CompleteRequest(text=text, max_tokens=12)
            me = (("x-client-id", "me"),)
            await asyncio.gather(*(served.inference.Complete(call, metadata=me) for _ in range(3)))
            await refused(served.inference.Complete(CompleteRequest(text=text, max_tokens=0)))
            await asyncio.sleep(0.05)


def check(target: Target, series: list[Any]) -> None:
    """There are series, their labels have what the legend shows, and one at least has a number that means something."""
    assert series, f"{target.panel}: nothing for {target.expression}"
    for one in series:
        assert set(re.findall(r"\{\{(\w+)\}\}", target.legend)) <= one["metric"].keys(), target
    assert len({json.dumps(one["metric"], sort_keys=True) for one in series}) == len(series)
    numbers = [float(one["value"][1]) for one in series]
    has_moved = any(math.isfinite(number) and number != 0 for number in numbers)
    assert has_moved or target.is_quiet, f"{target.panel}: only {numbers[:5]} for {target.expression}"


async def answered(server: Prometheus, target: Target, num_instances: int, **values: str) -> None:
    """Asks until the answer is as it must be: a scrape that a loaded machine did not answer in time leaves gaps."""
    end = asyncio.get_running_loop().time() + GAP_SECONDS
    while True:
        series = await server.query(filled(target.expression, **values))
        try:
            check(target, series)
            by_instance = {one["metric"]["instance"] for one in series if "instance" in one["metric"]}
            assert len(by_instance) in (0, num_instances), target
        except AssertionError:
            if asyncio.get_running_loop().time() > end:
                raise
            await asyncio.sleep(0.2)
        else:
            return


@needs_prometheus
@pytest.mark.slow
async def test_every_query_has_an_answer(tmp_path: Path) -> None:
    """Every query of every panel gives series and numbers, of all daemons, of one and of two chosen ones; the variables have
    the values that Prometheus knows; what is quiet on a daemon that is well is known, and named above."""
    assert {metric.exposed_name for metric in METRICS.values()} >= QUIET
    engine = FakeEngine(rule=letters, step_seconds=0.005)
    # Two addresses of one daemon are two daemons to Prometheus.
    metrics = MetricsSettings(listen=("127.0.0.1:0", "127.0.0.1:0"))
    async with (
        serving(engine=engine, metrics=metrics) as served,
        prometheus(tmp_path, *served.daemon.observability.addresses) as server,
    ):
        first, second = addresses = sorted(served.daemon.observability.addresses)

        async def are_scraped() -> bool:
            return await values_of(server, "instance", job=".+") == addresses

        await eventually(are_scraped, PATIENCE_SECONDS)
        await asyncio.sleep(1.5)  # one scrape more, of a daemon that has done nothing
        is_over = asyncio.Event()
        loading = asyncio.create_task(load(served, is_over))
        try:
            await asyncio.sleep(3.0)
            jobs = await values_of(server, "job")
            assert jobs == ["hotgraph"]
            found = list(targets())
            everything = variables()["instance"]["allValue"]
            for instances, num_instances in ((everything, 2), (chosen(first), 1)):
                for target in found:
                    await answered(server, target, num_instances, job=chosen(*jobs), instance=instances)
            uptime = next(target for target in found if target.panel == "Uptime")
            await answered(server, uptime, 2, job=chosen(*jobs), instance=chosen(first, second))
            nowhere = (filled(target.expression, job=chosen(*jobs), instance=chosen("nowhere:1")) for target in found)
            assert not any(await asyncio.gather(*map(server.query, nowhere)))
        finally:
            is_over.set()
            await loading
        print(f"{len(found)} queries of {len({one.panel for one in found})} panels have answers")
