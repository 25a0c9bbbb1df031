"""Reads a daemon's metrics as a scraper would."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: str

    def value(self, name: str, **labels: str) -> float:
        """Of the one sample with this name and these labels; 0 when there is none."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self.body)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) <= 1, f"{name} {labels} is not one sample but {len(found)}"
        return found[0] if found else 0.0


async def exchange(address: str, data: bytes, *, context: ssl.SSLContext | None = None) -> bytes:
    """Sends the bytes and reads until the end."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 20.0)
    finally:
        writer.close()


async def scrape(
    address: str,
    *,
    accept: str = "text/plain",
    token: str = "",
    request: str = "GET /metrics HTTP/1.1",
    context: ssl.SSLContext | None = None,
) -> Answer:
    """One request of one connection. Raises ConnectionResetError when nothing is answered."""
    lines = [request, "Host: test", f"Accept: {accept}", *([f"Authorization: Bearer {token}"] if token else []), "", ""]
    answer = (await exchange(address, "\r\n".join(lines).encode(), context=context)).decode()
    if not answer:
        raise ConnectionResetError("no answer")
    head, _, body = answer.partition("\r\n\r\n")
    status, *pairs = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (pair.partition(":") for pair in pairs)}
    assert int(headers["content-length"]) == len(body.encode())
    return Answer(int(status.split()[1]), headers, body)
