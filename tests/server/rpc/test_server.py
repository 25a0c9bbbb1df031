"""How the server is put together: what the library is told before it is loaded, and how services are added to it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hotgraph.v1 import generation_pb2
from hotgraph.v1.inference_service_pb2 import GenerateRequest
from hotgraph_server.request import Request
from hotgraph_server.rpc.wire import generation
from tests.integration.harness import letters, serving

START = """
import asyncio, os
import hotgraph_server.daemon
import grpc.aio

async def start():
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await server.stop(None)

asyncio.run(start())
print(os.environ["GRPC_EXPERIMENTS"])
"""


@pytest.mark.parametrize("own", ["", "-event_engine_fork"])
def test_the_library_knows_what_it_is_told(own: str) -> None:
    """The daemon's modules choose gRPC's experiments before gRPC is loaded, unless the user did; gRPC knows them all."""
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    if own:
        environment["GRPC_EXPERIMENTS"] = own
    done = subprocess.run(
        [sys.executable, "-c", START], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == (own or "-event_engine_client,-event_engine_listener")
    assert "Unknown experiment" not in done.stderr


async def test_the_engine_works_while_started_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request's first step is with the engine before Started is made, and Started comes while that step still runs."""
    async with serving(rule=letters) as served:
        num_batches: list[int] = []
        make = generation.started_message

        def noting(request: Request, model_id: str) -> generation_pb2.Started:
            num_batches.append(len(served.engine.batches))
            return make(request, model_id)

        monkeypatch.setattr(generation, "started_message", noting)
        served.engine.hold_step(0)
        events = aiter(served.inference.Generate(GenerateRequest(text="hello", max_tokens=1)))
        assert (await anext(events)).started.prompt_tokens == 6
        assert num_batches == [1]
        await served.engine.wait_held()
        served.engine.release()
        assert [event.WhichOneof("event") async for event in events] == ["tokens", "finished"]
