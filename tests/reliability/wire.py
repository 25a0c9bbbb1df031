"""A caller that may misbehave: HTTP/2 by hand over h2, for what gRPC's own clients would never send.

It knows frames and how gRPC puts a message into them, and nothing of what the messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings

HEADERS: Final = 0x1
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PING: Final = 0x6
GOAWAY: Final = 0x7
END_HEADERS: Final = 0x4
END_STREAM: Final = 0x1


def framed(message: bytes) -> bytes:
    """A gRPC message as it stands in DATA frames: not compressed, its length, its bytes."""
    return struct.pack(">BI", 0, len(message)) + message


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream_id) + payload


def literal_headers(path: str, *more: tuple[str, str]) -> bytes:
    """The headers of a gRPC call as an HPACK block that no table is needed for; all strings below 127 bytes."""

    def literal(name: str, value: str) -> bytes:
        return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))

    return b"".join(literal(*header) for header in (*_headers(path), *more))


def _headers(path: str) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]


class Wire:
    """One connection. `is_silent`: from then on nothing is answered, not even a ping.

    Flow control is by hand: no window is ever widened unless `reads` is set.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, reads: bool) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.is_silent = False
        self.goaway_codes: list[int] = []  # in the order of their coming; a graceful end sends two
        self.closed_time: float | None = None  # on the monotonic clock
        self.num_bytes: dict[int, int] = defaultdict(int)  # of DATA, by stream
        self.reset_codes: dict[int, int] = {}
        self.statuses: dict[int, int] = {}  # grpc-status, by stream
        self.num_pings = 0  # that the daemon sent
        self.num_pings_sent = 0
        self._reader = reader
        self.writer = writer
        self._reads = reads
        self._unparsed = bytearray()
        self._settled = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await self._reader.read(1 << 16):
                for event in self.h2.receive_data(self._without_goaway(data)):
                    self._take(event)
                if self.is_silent:
                    self.h2.data_to_send()  # thrown away
                else:
                    self.flush()
        self.closed_time = time.monotonic()
        self._settled.set()

    def _without_goaway(self, data: bytes) -> bytes:
        """The whole frames that are here. After a GOAWAY h2 takes nothing more, but a server still ends its streams."""
        self._unparsed += data
        taken = bytearray()
        while len(self._unparsed) >= 9:
            end = 9 + int.from_bytes(self._unparsed[:3], "big")
            if len(self._unparsed) < end:
                break
            if self._unparsed[3] == GOAWAY:
                self.goaway_codes.append(int.from_bytes(self._unparsed[13:17], "big"))
            else:
                taken += self._unparsed[:end]
            del self._unparsed[:end]
        return bytes(taken)

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.DataReceived():
                self.num_bytes[event.stream_id] += len(event.data)
                if self._reads and event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                # Text, as the connection is told to decode them; the types of h2 do not say so.
                status = {str(name): str(value) for name, value in event.headers}.get("grpc-status")
                if status is not None:
                    self.statuses[event.stream_id] = int(status)
            case h2.events.StreamReset():
                self.reset_codes[event.stream_id] = int(event.error_code)
            case h2.events.PingReceived():
                self.num_pings += 1
            case h2.events.RemoteSettingsChanged():
                self._settled.set()

    def flush(self) -> None:
        """Sends what h2 has gathered."""
        if not self.writer.is_closing():
            self.writer.write(self.h2.data_to_send())

    def call(self, path: str, message: bytes | None, *, is_whole: bool = True) -> int:
        """Begins a call, and returns its stream. `message` None: the headers alone; not `is_whole`: half of it is kept back."""
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, _headers(path))
        if message is not None:
            data = framed(message)
            self.h2.send_data(stream_id, data if is_whole else data[: max(5, len(data) // 2)], end_stream=is_whole)
        self.flush()
        return stream_id

    def ping(self) -> None:
        self.num_pings_sent += 1
        self.h2.ping(b"reliable")
        self.flush()

    async def settled(self) -> None:
        """Until the daemon's settings are here, or it has closed."""
        await asyncio.wait_for(self._settled.wait(), 10)

    @property
    def max_streams(self) -> int:
        """What the daemon says that it takes."""
        return self.h2.remote_settings.max_concurrent_streams

    @property
    def is_closed(self) -> bool:
        return self.closed_time is not None

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def dial(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection to `unix:PATH` or `HOST:PORT`."""
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


@asynccontextmanager
async def wire(address: str, *, reads: bool = True, window_bytes: int | None = None) -> AsyncIterator[Wire]:
    """A connection whose settings are exchanged. `window_bytes`: what the daemon may send on a stream, unasked."""
    reader, writer = await dial(address)
    connection = Wire(reader, writer, reads=reads)
    if window_bytes is not None:
        connection.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window_bytes})
        connection.h2.clear_outbound_data_buffer()
        connection.h2.local_settings.acknowledge()
    connection.h2.initiate_connection()
    connection.flush()
    try:
        await connection.settled()
        yield connection
    finally:
        await connection.close()
