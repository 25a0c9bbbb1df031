"""A Unix socket that passes bytes on to the first daemon that is there, and that may cut connections after a while.

Of HTTP/2 it knows how long a frame is and which are the headers of an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

CHUNK_BYTES = 1024
FRAME_HEADER_BYTES = 9  # length (3), type, flags, stream (4)
HEADERS_FRAME = 1
END_STREAM = 1  # headers that end the stream are an error's: no answer follows
END_HEADERS = 4
ARRIVAL_SECONDS = 0.01  # what was sent arrives before the cut


class Relay:
    """`upstreams` are sockets, tried in this order for each connection.

    With cut_after_bytes each connection is cut, in the middle of whatever it is, once the server has sent so many bytes on it.
    With num_headers_cut as many connections are cut when the headers of their first answer went through and nothing of the
    answer, then one is left whole, and so on.
    """

    def __init__(
        self, path: Path, upstreams: Sequence[Path], cut_after_bytes: int | None = None, num_headers_cut: int = 0
    ) -> None:
        self.target = f"unix:{path}"
        self._path = path
        self._upstreams = upstreams
        self._cut_after_bytes = cut_after_bytes
        self._num_headers_cut = num_headers_cut
        self._num_answers = 0  # connections on which headers came
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

    def begin_again(self) -> None:
        """The next connections are the first ones again."""
        self._num_answers = 0

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await self._connect()
        if upstream is None:
            writer.transport.abort()
            return
        up_reader, up_writer = upstream
        answers = self._pass_headers if self._num_headers_cut else self._pass_answers
        for passing in (_pass(reader, up_writer, None), answers(up_reader, writer)):
            task = asyncio.create_task(passing)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_answers(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        await _pass(source, sink, self._cut_after_bytes)

    async def _pass_headers(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Frame by frame up to the first answer's headers; then a cut, or the rest."""
        try:
            is_whole = False
            while not is_whole:
                frame = await source.readexactly(FRAME_HEADER_BYTES)
                sink.write(frame + await source.readexactly(int.from_bytes(frame[:3], "big")))
                await sink.drain()
                if frame[3] == HEADERS_FRAME and not frame[4] & END_STREAM:
                    assert frame[4] & END_HEADERS, "headers of an answer are short"
                    self._num_answers += 1
                    is_whole = self._num_answers % (self._num_headers_cut + 1) == 0
                    if not is_whole:
                        await asyncio.sleep(ARRIVAL_SECONDS)
                        break
        except (OSError, asyncio.IncompleteReadError):
            is_whole = False  # one side is gone, which the other learns here
        if is_whole:
            await _pass(source, sink, None)
        else:
            sink.transport.abort()

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
            await asyncio.sleep(ARRIVAL_SECONDS)
    except OSError:
        pass  # one side is gone, which the other learns below
    finally:
        sink.transport.abort()
