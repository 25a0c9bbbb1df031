"""A daemon as a process of its own, and what it logs."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Never

from hotgraph_server.config import Settings
from tests.integration.harness import PATIENCE_SECONDS, eventually


class Process:
    """A daemon's process; its log is gathered."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log.append(line.decode(errors="replace").rstrip())

    async def logged(self, text: str, patience_seconds: float = PATIENCE_SECONDS) -> str:
        """The first line that holds the text, as soon as it is there."""

        def find() -> str | None:
            return next((line for line in self.log if text in line), None)

        line: str = await eventually(lambda: find() or (self._reader.done() and self._fail(text)), patience_seconds)
        return line

    def _fail(self, text: str) -> Never:
        raise AssertionError(f"the process ended without saying {text!r}:\n" + "\n".join(self.log))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """The exit status."""
        status = await asyncio.wait_for(self.process.wait(), PATIENCE_SECONDS)
        await self._reader
        return status


@asynccontextmanager
async def process(settings: Settings, program: str) -> AsyncIterator[Process]:
    """A daemon in a process of its own, which `program` runs; killed in the end if it still runs."""
    arguments = (sys.executable, "-c", program, settings.model_dump_json())
    running = Process(await asyncio.create_subprocess_exec(*arguments, stderr=asyncio.subprocess.PIPE))
    try:
        yield running
    finally:
        if running.process.returncode is None:
            running.signal(signal.SIGKILL)
        await running.ended()
