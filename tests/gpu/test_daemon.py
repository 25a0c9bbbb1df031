"""The daemon on a GPU as a process of its own: what a client sees of it, and how it dies."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2

from hotgraph.v1 import graph_pb2, graph_service_pb2
from hotgraph.v1.generation_pb2 import TokenIds
from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from hotgraph_server.config import KvCacheSettings, ModelSettings, ServerSettings, Settings
from tests.gpu.wild import FATAL_PROMPT
from tests.integration.harness import Caller, eventually, refused
from tests.integration.processes import process
from tests.server.models.tiny_models import write_llama

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]

START_SECONDS = 120.0  # the first start on a machine compiles kernels, maybe beside other tests that do

PROGRAM = """
import logging, sys
from hotgraph_server import daemon
from hotgraph_server.config import Settings
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
sys.exit(daemon.run(Settings.model_validate_json(sys.argv[1])))
"""

SABOTAGED = f"from tests.gpu.wild import sabotage\nsabotage()\n{PROGRAM}"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        yield Path(path)


def settings(folder: Path) -> Settings:
    return Settings(
        model=ModelSettings(source=str(write_llama(folder / "model")), device="cuda:0", dtype="float16"),
        server=ServerSettings(listen=(f"unix:{folder}/s",)),
        kv_cache=KvCacheSettings(size_bytes=256 << 20),
    )


async def rest(call: Any) -> None:
    """Reads a stream, of which something was read before, to its end."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def is_serving(caller: Caller, service: str) -> bool:
    response = await caller.health.Check(health_pb2.HealthCheckRequest(service=service))
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def test_a_life_on_the_gpu(folder: Path) -> None:
    """It serves, captures its core, shows and steers its graphs, replays them, and ends well."""
    async with process(settings(folder), PROGRAM) as daemon:
        await daemon.logged("serving", START_SECONDS)
        async with Caller(f"unix:{folder}/s") as caller:
            await caller.check_alive()
            await eventually(lambda: is_serving(caller, "hotgraph.warm"))
            stream = caller.inference.Generate(GenerateRequest(text="Hello", max_tokens=20))
            events = [event async for event in stream]
            receipt = events[-1].finished.receipt
            assert receipt.num_graph_steps > 0
            graphs = caller.graphs
            ready = (await graphs.ListGraphs(graph_service_pb2.ListGraphsRequest(page_size=1000))).graphs
            pinned = [graph.name for graph in ready if graph.HasField("pin")]
            assert len(pinned) == 14
            wish = graph_service_pb2.PrewarmGraphsRequest(wait=duration_pb2.Duration(seconds=20))
            wish.keys.add(tokens=3, rows=3, sampler=graph_pb2.SAMPLER_VARIANT_GREEDY)
            made = (await graphs.PrewarmGraphs(wish)).graphs
            assert [graph.state for graph in made] == [graph_pb2.GRAPH_STATE_READY]
            assert made[0].size_bytes > 0
            await graphs.EvictGraph(graph_service_pb2.EvictGraphRequest(name=made[0].name))
            assert made[0].name not in {
                graph.name
                for graph in (
                    await graphs.ListGraphs(
                        graph_service_pb2.ListGraphsRequest(page_size=1000, states=[graph_pb2.GRAPH_STATE_READY])
                    )
                ).graphs
            }
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0


async def test_more_kv_cache_than_memory_is_said(folder: Path) -> None:
    """A KV cache that does not fit ends the start with 78 and the reason, not with a crash."""
    wanted = settings(folder)
    wanted = wanted.model_copy(update={"kv_cache": KvCacheSettings(size_bytes=1 << 45)})
    async with process(wanted, PROGRAM) as daemon:
        await daemon.logged("no memory for a KV cache")
        assert await daemon.ended() == 78


async def test_a_wild_write_ends_the_process_with_a_clear_word(folder: Path) -> None:
    """After a kernel's illegal access what is in flight ends with ENGINE_FAILED, and the process exits with 70."""
    async with process(settings(folder), SABOTAGED) as daemon:
        await daemon.logged("serving", START_SECONDS)
        async with Caller(f"unix:{folder}/s") as caller:
            await caller.check_alive()
            steady = caller.inference.Generate(GenerateRequest(token_ids=TokenIds(ids=[5] * 9), max_tokens=60))
            await steady.read()
            fatal = caller.inference.Complete(CompleteRequest(token_ids=TokenIds(ids=[7] * FATAL_PROMPT), max_tokens=5))
            error = await refused(fatal)
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED")
            other = await refused(rest(steady))
            assert (other.code, other.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED")
        assert await daemon.ended() == 70
