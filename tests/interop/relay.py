"""A Unix socket that passes bytes on to the first daemon that is there, and that may cut each connection after a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

CHUNK_BYTES = 1024


class Relay:
    """`upstreams` are sockets, tried in this order for each connection.

    With cut_after_bytes each connection is cut, in the middle of whatever it is, once the server has sent so many bytes on it.
    """

    def __init__(self, path: Path, upstreams: Sequence[Path], cut_after_bytes: int | None = None) -> None:
        self.target = f"unix:{path}"
        self._path = path
        self._upstreams = upstreams
        self._cut_after_bytes = cut_after_bytes
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        listener = await asyncio.start_unix_server(self._accept, self._path)
        try:
            yield
        finally:
            listener.close()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await self._connect()
        if upstream is None:
            writer.transport.abort()
            return
        up_reader, up_writer = upstream
        for source, sink, max_bytes in ((reader, up_writer, None), (up_reader, writer, self._cut_after_bytes)):
            task = asyncio.create_task(_pass(source, sink, max_bytes))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for path in self._upstreams:
            try:
                return await asyncio.open_unix_connection(path)
            except OSError:
                continue  # not there: the next
        return None


async def _pass(source: asyncio.StreamReader, sink: asyncio.StreamWriter, max_bytes: int | None) -> None:
    num_left = max_bytes
    try:
        while num_left != 0:
            data = await source.read(CHUNK_BYTES if num_left is None else min(num_left, CHUNK_BYTES))
            if not data:
                break
            sink.write(data)
            await sink.drain()
            num_left = None if num_left is None else num_left - len(data)
        if num_left == 0:
            await asyncio.sleep(0.01)  # what was sent arrives before the cut
    except OSError:
        pass  # one side is gone, which the other learns below
    finally:
        sink.transport.abort()
