"""Programs that attack a daemon from a process of their own: `python -m tests.reliability.attackers KIND ADDRESS ...`.

Frames are made by hand where speed matters. The last line that one prints is how much it did, for the least load of a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Final

from tests.reliability.wire import END_HEADERS, HEADERS, PING, RST_STREAM, SETTINGS, dial, frame, literal_headers, wire

GENERATE: Final = "/hotgraph.v1.InferenceService/Generate"
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
BATCH: Final = 100  # frames' pairs of one write


async def resets(address: str, per_second: str, seconds: str) -> int:
    """Opens calls and resets them at once, at this rate, on as many connections as the daemon makes necessary."""
    block = literal_headers(GENERATE)
    cancel = struct.pack(">I", 8)
    end = time.monotonic() + float(seconds)
    begin = time.monotonic()
    num_resets = 0
    while time.monotonic() < end:
        try:
            async with wire(address) as connection:
                stream_id = 1
                while time.monotonic() < end and not connection.is_closed:
                    frames = bytearray()
                    for _ in range(BATCH):
                        frames += frame(HEADERS, END_HEADERS, stream_id, block)
                        frames += frame(RST_STREAM, 0, stream_id, cancel)
                        stream_id += 2
                    connection.writer.write(bytes(frames))
                    await connection.writer.drain()
                    num_resets += BATCH
                    await asyncio.sleep(max(0.0, num_resets / float(per_second) - (time.monotonic() - begin)))
        except (ConnectionError, TimeoutError):
            await asyncio.sleep(0.01)
    return num_resets


async def pings(address: str, seconds: str) -> int:
    """Pings without pause, on a new connection whenever one is ended. The answers are taken, and not looked at."""
    end = time.monotonic() + float(seconds)
    num_pings = 0
    while time.monotonic() < end:
        try:
            reader, writer = await dial(address)
            writer.write(PREFACE + frame(SETTINGS, 0, 0, b""))
            drain = asyncio.create_task(swallow(reader))
            try:
                while time.monotonic() < end and not drain.done():
                    writer.write(frame(PING, 0, 0, b"reliable") * BATCH)
                    await writer.drain()
                    num_pings += BATCH
                    await asyncio.sleep(0)
            finally:
                drain.cancel()
                writer.close()
        except OSError:
            await asyncio.sleep(0.01)
    return num_pings


async def swallow(reader: asyncio.StreamReader) -> None:
    """Reads until the other side has closed."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 20):
            pass


async def streams(address: str, num_streams: str) -> int:
    """Opens so many generations and reads them until it is killed. Says `reading` when all have begun; ends without that word
    when nobody listens."""
    from hotgraph.v1.inference_service_pb2 import GenerateRequest

    message = GenerateRequest(text="x", max_tokens=1000).SerializeToString()
    with contextlib.suppress(ConnectionError, FileNotFoundError):
        async with wire(address) as connection:
            for _ in range(int(num_streams)):
                connection.call(GENERATE, message)
            while len(connection.num_bytes) < int(num_streams):  # noqa: ASYNC110  (the connection tells nobody)
                await asyncio.sleep(0.005)
            print("reading", flush=True)
            await asyncio.Event().wait()
    return 0


async def sockets(address: str, num_sockets: str) -> int:
    """Opens so many sockets and says nothing on them. Says `opened` when all are, and ends when the daemon has closed them."""
    async with contextlib.AsyncExitStack() as stack:
        readers = []
        for _ in range(int(num_sockets)):
            reader, writer = await dial(address)
            stack.callback(writer.close)
            readers.append(reader)
        print("opened", flush=True)
        await asyncio.gather(*map(swallow, readers))
    return int(num_sockets)


async def sessions(address: str, first_seed: str, num_sessions: str) -> int:
    """Sessions of damaged frames, a few at a time. Says how they went on as JSON."""
    from tests.reliability.test_frames import NUM_AT_ONCE, play

    seeds = iter(range(int(first_seed), int(first_seed) + int(num_sessions)))
    ends: Counter[str] = Counter()

    async def work() -> None:
        for seed in seeds:
            ends[await play(address, seed)] += 1

    await asyncio.gather(*(work() for _ in range(NUM_AT_ONCE)))
    print(json.dumps(ends), flush=True)
    return ends.total()


KINDS: Final[dict[str, Callable[..., Coroutine[None, None, int]]]] = {
    "resets": resets,
    "pings": pings,
    "streams": streams,
    "sockets": sockets,
    "sessions": sessions,
}


@asynccontextmanager
async def attacker(*arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """One of these programs, started; killed in the end if it still runs."""
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.reliability.attackers", *map(str, arguments), stdout=asyncio.subprocess.PIPE
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


async def count(running: asyncio.subprocess.Process) -> int:
    """What a program that ends by itself has done."""
    output, _ = await running.communicate()
    assert running.returncode == 0
    return int(output.split()[-1])


if __name__ == "__main__":
    print(asyncio.run(KINDS[sys.argv[1]](*sys.argv[2:])), flush=True)
