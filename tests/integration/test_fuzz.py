"""Requests that no client would make, by the thousand: each ends with a status of its own, and the daemon serves on.

`HOTGRAPH_FUZZ_REQUESTS` asks for more of them, `HOTGRAPH_FUZZ_SEED` for others; a failure names the bytes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import random
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from hotgraph.v1 import admin_service_pb2, graph_service_pb2, inference_service_pb2
from tests.integration.harness import Caller, wire_error
from tests.integration.test_process import fake_settings, run_fake

VECTORS = Path(__file__).parents[1] / "contract" / "vectors.json"
NUM_REQUESTS = int(os.environ.get("HOTGRAPH_FUZZ_REQUESTS", "3000"))
SEED = int(os.environ.get("HOTGRAPH_FUZZ_SEED", "1"))
NUM_CALLERS = 8
CALL_SECONDS = 2.0
MAX_GROWTH_BYTES = 10 << 20
UNTOUCHED = {"Drain"}  # which does what it says

# What may be said of a wrong or of a right request. UNKNOWN and INTERNAL would be the daemon's own fault, and UNAVAILABLE, too,
# but for a graph that the request wants and that is not there yet.
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True)
class Method:
    """A call of the contract. `seeds`: messages of its request's type, in binary, to begin with."""

    path: str
    request: Descriptor
    is_stream: bool
    seeds: tuple[bytes, ...]


def methods() -> list[Method]:
    vectors: dict[str, list[bytes]] = {}
    for vector in json.loads(VECTORS.read_text()):
        vectors.setdefault(vector["type"], []).append(base64.b64decode(vector["binary"]))
    found = []
    for module in (inference_service_pb2, graph_service_pb2, admin_service_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                if method.name not in UNTOUCHED:
                    kind = method.input_type
                    seeds = tuple(vectors[kind.full_name])
                    found.append(Method(f"/{service.full_name}/{method.name}", kind, method.server_streaming, seeds))
    return found


class Fuzzer:
    """Makes requests, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)
        self._methods = methods()
        # Generating is what strangers do, and what has most fields.
        self._weights = [4 if method.path.endswith(("/Generate", "/Complete")) else 1 for method in self._methods]

    def request(self) -> tuple[Method, bytes]:
        """A call and its message: a made up one, or one of the known ones, and most of them damaged."""
        source = self._source
        method = source.choices(self._methods, self._weights)[0]
        data = (
            self._made_up(method.request, depth=4).SerializePartialToString()
            if source.random() < 0.5
            else source.choice(method.seeds)
        )
        for _ in range(source.choice((0, 1, 1, 2, 5))):
            data = self._damaged(data, method)
        return method, data

    def _damaged(self, data: bytes, method: Method) -> bytes:
        source = self._source
        at = source.randrange(len(data) + 1)
        to = min(len(data), at + source.choice((1, 1, 2, 8, 64)))
        match source.randrange(8):
            case 0:  # one bit
                if not data:
                    return b"\x01"
                at = source.randrange(len(data))
                return data[:at] + bytes([data[at] ^ 1 << source.randrange(8)]) + data[at + 1 :]
            case 1:  # other bytes
                return data[:at] + source.randbytes(to - at) + data[to:]
            case 2:
                return data[:at] + data[to:]
            case 3:
                return data[:at]
            case 4:
                return data[:to] + data[at:]
            case 5:
                return data[:at] + source.randbytes(source.choice((1, 4, 100))) + data[at:]
            case 6:  # the longest number
                return data[:at] + b"\xff" * 9 + b"\x01" + data[to:]
            case _:  # the end of another message
                other = source.choice(source.choice(self._methods).seeds or method.seeds)
                return data[:at] + other[source.randrange(len(other) + 1) :]

    def _made_up(self, kind: Descriptor, depth: int) -> Message:
        """A message of some of its fields, with values at the ends of their ranges and beyond what is sensible."""
        source = self._source
        message = GetMessageClass(kind)()
        for field in kind.fields:
            if source.random() < 0.5 or (field.message_type is not None and depth == 0):
                continue
            num_values = source.choice((1, 1, 2, 17, 600)) if field.is_repeated else 1
            for _ in range(num_values):
                self._set(message, field, depth)
        return message

    def _set(self, message: Any, field: FieldDescriptor, depth: int) -> None:
        if field.message_type is not None:
            value: Any = self._made_up(field.message_type, depth - 1)
            if field.message_type.GetOptions().map_entry:
                return
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                getattr(message, field.name).CopyFrom(value)
            return
        value = self._scalar(field)
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)

    def _scalar(self, field: FieldDescriptor) -> Any:
        source = self._source
        numbers: list[int] = [0, 1, 2, 3, 16, 17, 255, 257, 258, 1023, 1024, 1 << 20]
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                if field.type == FieldDescriptor.TYPE_BYTES:
                    return source.randbytes(source.choice((0, 1, 1000)))
                return source.choice(TEXTS)
            case FieldDescriptor.CPPTYPE_BOOL:
                return source.random() < 0.5
            case FieldDescriptor.CPPTYPE_ENUM:
                return source.choice((0, 1, 2, 3, 99, 2**31 - 1, -(2**31)))
            case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
                return source.choice(FLOATS)
            case FieldDescriptor.CPPTYPE_UINT32:
                return source.choice([*numbers, 2**32 - 1])
            case FieldDescriptor.CPPTYPE_UINT64:
                return source.choice([*numbers, 2**64 - 1])
            case FieldDescriptor.CPPTYPE_INT32:
                return source.choice([*numbers, -1, 2**31 - 1, -(2**31)])
            case _:
                return source.choice([*numbers, -1, 2**63 - 1, -(2**63)])


TEXTS = (
    "",
    "x",
    "fake",
    "graphs/decode-1",
    "graphs/" + "a" * 500,
    "../../etc/passwd",
    "a\x00b",
    "\ufeff\u202e\U0001f600",
    "é" * 300,
    "%s%n{0}{{",
    " " * 5000,
)
FLOATS = (
    0.0,
    -0.0,
    0.5,
    1.0,
    2.0,
    1e-45,
    1e-3,
    10.0,
    -1.0,
    math.inf,
    -math.inf,
    math.nan,
    3.4e38,
    struct.unpack("<f", b"\1\0\0\0")[0],
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hg") as path:
        yield Path(path)


async def ask(channel: Any, method: Method, data: bytes) -> tuple[grpc.StatusCode, str]:
    """The status of one call, and the reason in its details. A watch that goes on is left after its time."""
    try:
        if not method.is_stream:
            await channel.unary_unary(method.path)(data, timeout=CALL_SECONDS)
            return grpc.StatusCode.OK, ""
        timeout = CALL_SECONDS if method.path.endswith("/Generate") else 0.05
        async for _ in channel.unary_stream(method.path)(data, timeout=timeout):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), wire_error(error).reason
    return grpc.StatusCode.OK, ""


def is_expected(status: grpc.StatusCode, reason: str) -> bool:
    """Whether the request may end so. Refusals carry a reason; a deadline may be the caller's own."""
    if status in {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}:
        return True
    return bool(reason) and (status in EXPECTED or reason == "GRAPH_NOT_READY")


def resident_bytes(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(30 + NUM_REQUESTS // 50)
async def test_requests_at_random(folder: Path) -> None:
    """Every one has an expected status with its details; no error is logged, memory stays, a good request is served."""
    address = f"unix:{folder}/s"
    fuzzer = Fuzzer(SEED)
    statuses: Counter[grpc.StatusCode] = Counter()
    wrong: list[str] = []

    async def call(channel: grpc.aio.Channel, num_requests: int) -> None:
        for _ in range(num_requests):
            method, data = fuzzer.request()
            status, reason = await ask(channel, method, data)
            statuses[status] += 1
            if not is_expected(status, reason):
                wrong.append(f"{status.name} {reason} of {method.path}: {data.hex()}")

    async def calls(channel: grpc.aio.Channel, num_requests: int) -> None:
        await asyncio.gather(*(call(channel, num_requests // NUM_CALLERS) for _ in range(NUM_CALLERS)))

    async with run_fake(fake_settings(address)) as daemon:
        await daemon.logged("serving fake")
        async with Caller(address) as caller:
            await calls(caller.channel, NUM_REQUESTS // 2)  # caches fill, and pools grow
            before = resident_bytes(daemon.process.pid)
            await calls(caller.channel, NUM_REQUESTS // 2)
            growth = resident_bytes(daemon.process.pid) - before
            await caller.check_alive()
        daemon.signal(15)
        assert await daemon.ended() == 0
    print(f"{dict(statuses)}, memory {growth / 1024:.0f} KiB more")
    assert wrong == []
    assert not any(word in line for line in daemon.log for word in ("Traceback", "ERROR", "CRITICAL")), daemon.log
    assert growth <= MAX_GROWTH_BYTES
    # Some are right, and most are wrong: else the fuzzer would be the one that is tested.
    assert statuses[grpc.StatusCode.INVALID_ARGUMENT] > NUM_REQUESTS // 4
    assert statuses[grpc.StatusCode.OK] > NUM_REQUESTS // 20
