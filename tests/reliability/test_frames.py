"""Frames of HTTP/2 that no client sends: sessions made up and damaged, and how honest callers fare meanwhile.

A session is a handful of moves, each a game of its own or damaged bytes of a good call; a seed makes it again.
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from hotgraph.v1.inference_service_pb2 import CompleteRequest, GenerateRequest
from tests.integration.harness import Caller
from tests.reliability.attackers import PREFACE, attacker
from tests.reliability.probe import Health, probed
from tests.reliability.victims import is_free, victim
from tests.reliability.wire import (
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    dial,
    frame,
    framed,
    literal_headers,
)

COMPLETE: Final = "/hotgraph.v1.InferenceService/Complete"
DATA, PRIORITY, PUSH_PROMISE, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0x0, 0x2, 0x5, 0x7, 0x8, 0x9
BLOCK: Final = literal_headers(COMPLETE)
MESSAGE: Final = framed(CompleteRequest(text="frames", max_tokens=2).SerializeToString())
NUM_AT_ONCE: Final = 8
CI_MILLIS: Final = 1000.0

Move = Callable[[random.Random, int], bytes]


def call(chance: random.Random, stream: int) -> bytes:
    """A good call."""
    return frame(HEADERS, END_HEADERS, stream, BLOCK) + frame(DATA, END_STREAM, stream, MESSAGE)


def continuations(chance: random.Random, stream: int) -> bytes:
    """Headers in many pieces, of which the last may never come, or that another frame comes between."""
    pieces = frame(HEADERS, 0, stream, BLOCK[:10])
    for _ in range(chance.randint(0, 200)):
        pieces += frame(CONTINUATION, 0, stream, chance.choice([b"", BLOCK[10:20], b"\0\1a\1b"]))
    if chance.random() < 0.3:
        pieces += frame(PING, 0, 0, b"between.")
    return pieces + (frame(CONTINUATION, END_HEADERS, stream, BLOCK[10:]) if chance.random() < 0.5 else b"")


def settings(chance: random.Random, stream: int) -> bytes:
    """Settings without pause, with known and unknown names and any values, some on a stream, some of a wrong length."""
    frames = b""
    for _ in range(chance.randint(1, 50)):
        pairs = b"".join(
            struct.pack(
                ">HI", chance.choice([1, 2, 3, 4, 5, 6, 8, 99]), chance.choice([0, 1, 65535, 2**31 - 1, 2**32 - 1])
            )
            for _ in range(chance.randint(0, 4))
        )
        frames += frame(SETTINGS, chance.choice([0, 0, 0, 1]), 0 if chance.random() < 0.9 else stream, pairs)
    return frames + (frame(SETTINGS, 0, 0, b"12345") if chance.random() < 0.1 else b"")


def windows(chance: random.Random, stream: int) -> bytes:
    """Windows widened by nothing, by too much, of streams that are not there; a window of nothing and a call behind it."""
    frames = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, chance.choice([0, 1, 2**31 - 1]))) + call(chance, stream)
    for _ in range(chance.randint(1, 20)):
        target = chance.choice([0, stream, stream + 2, 2**31 - 1])
        frames += frame(WINDOW_UPDATE, 0, target, struct.pack(">I", chance.choice([0, 1, 65535, 2**31 - 1])))
    return frames


def resets(chance: random.Random, stream: int) -> bytes:
    """Calls that are opened and reset at once, by any code; resets of streams that never were."""
    frames = b""
    for number in range(chance.randint(1, 100)):
        code = struct.pack(">I", chance.choice([0, 8, 2**32 - 1]))
        if chance.random() < 0.9:
            frames += frame(HEADERS, END_HEADERS, stream + 2 * number, BLOCK)
        frames += frame(RST_STREAM, 0, stream + 2 * number, code)
    return frames


def oddities(chance: random.Random, stream: int) -> bytes:
    """A frame of any kind and flags, on any stream, with any bytes, or with a length that it does not have."""
    payload = chance.randbytes(chance.choice([0, 1, 4, 5, 8, 17, 300]))
    kind = chance.choice(
        [DATA, HEADERS, PRIORITY, RST_STREAM, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION, 0x42]
    )
    made = frame(kind, chance.randrange(256), chance.choice([0, 1, stream, 2**31 - 1, 2**32 - 1]), payload)
    return made if chance.random() < 0.8 else struct.pack(">I", chance.choice([0, 16384, 2**24 - 1]))[1:] + made[3:]


def damaged(chance: random.Random, stream: int) -> bytes:
    """A good call of which some bytes are others, or which ends too soon. A path that is no text has a test of its own."""
    data = bytearray(call(chance, stream))
    for _ in range(chance.randint(1, 6)):
        data[chance.randrange(len(data))] = chance.randrange(128)
    return bytes(data[: chance.randint(1, len(data))] if chance.random() < 0.3 else data)


MOVES: Final[list[Move]] = [call, continuations, settings, windows, resets, oddities, damaged]


def session(seed: int) -> bytes:
    """All that a client of this seed sends."""
    chance = random.Random(seed)
    data = PREFACE if chance.random() < 0.97 else chance.randbytes(24)
    data += frame(SETTINGS, 0, 0, b"")
    for number in range(chance.randint(1, 6)):
        data += chance.choice(MOVES)(chance, 1 + 1000 * number)
    return data


async def play(address: str, seed: int) -> str:
    """Sends a session and takes what comes for a moment. How it went on: cut off, ended, still open, or not let in."""
    try:
        reader, writer = await dial(address)
    except ConnectionError:
        return "not let in"
    try:
        writer.write(session(seed))
        async with asyncio.timeout(0.1):
            await writer.drain()
            while await reader.read(1 << 16):
                pass
    except ConnectionError:
        return "cut off"
    except TimeoutError:
        return "open"
    finally:
        writer.close()
    return "ended"


async def fuzz(first_seed: int, num_sessions: int) -> Health:
    """So many sessions from a process of their own, a few at a time; the daemon must be whole afterwards."""
    async with victim() as daemon, Caller(daemon.address) as caller:
        await caller.check_alive()
        before_bytes, before_files = daemon.resident_bytes, daemon.num_files
        begin = time.monotonic()
        async with (
            probed(caller) as health,
            attacker("sessions", daemon.address, first_seed, num_sessions) as running,
        ):
            output, _ = await running.communicate()
        ends = Counter(json.loads(output.splitlines()[0]))
        seconds = time.monotonic() - begin
        await is_free(caller)
        await caller.check_alive()
        await asyncio.sleep(0.5)
        grown_mib = (daemon.resident_bytes - before_bytes) / (1 << 20)
        print(
            f"{num_sessions} sessions in {seconds:.0f} s, {dict(ends)}: {health}, memory {grown_mib:+.1f} MiB,"
            f" files {before_files} to {daemon.num_files}"
        )
        assert ends.total() == num_sessions
        assert len(ends) >= 2, "too much alike to mean anything"
        assert daemon.num_files <= before_files + 4
        assert not any(
            "ERROR:hotgraph" in line for line in daemon.process.log
        )  # gRPC itself logs whom it cannot answer
        assert daemon.process.process.returncode is None
        return health


async def test_damaged_sessions() -> None:
    """Some hundred sessions of damaged frames leave the daemon alive and whole, and no honest call fails."""
    health = await fuzz(0, 300)
    assert not health.failures
    assert health.p99 < CI_MILLIS


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_very_many_damaged_sessions() -> None:
    """100,000 of them."""
    health = await fuzz(1000, 100_000)
    assert not health.failures
    assert health.p99 < CI_MILLIS


async def test_a_path_that_is_no_text_ends_nothing_for_long() -> None:
    """One call whose path is not UTF-8 ends gRPC's own server: the same process serves again at once, ten times over, on both
    kinds of addresses, and nothing of the old servers stays."""
    for is_tcp in (True, False):
        async with victim(is_tcp=is_tcp) as daemon, Caller(daemon.address) as before:
            stream: Any = before.inference.Generate(GenerateRequest(text="x", max_tokens=100))
            await stream.read()
            longest = 0.0
            num_files = 0
            for number in range(10):
                _, writer = await dial(daemon.address)
                bad = literal_headers("/a/XXX").replace(b"XXX", b"\xd1ph")
                writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, bad))
                await writer.drain()
                await daemon.process.logged("made anew")
                if number:
                    await asyncio.sleep(0.3)
                begin = time.monotonic()
                async with Caller(daemon.address) as caller:
                    await caller.health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=10.0)
                    longest = max(longest, time.monotonic() - begin)
                    await caller.check_alive()
                writer.close()
                num_files = num_files or daemon.num_files
            while (event := await stream.read()) is not grpc.aio.EOF:
                last = event.WhichOneof("event")
            assert last == "finished", "a call under way goes on"
            assert sum("made anew" in line for line in daemon.process.log) == 10
            assert daemon.num_files <= num_files + 4
            print(f"served again after at most {1000 * longest:.0f} ms")
            daemon.process.signal(15)
            assert await daemon.process.ended() == 0


def test_sessions_differ_and_come_again() -> None:
    """A seed makes the same session again, and all kinds of frames are in the sessions of the test."""
    sessions = [session(seed) for seed in range(400)]
    assert sessions == [session(seed) for seed in range(400)]
    assert len(set(sessions)) > 380
