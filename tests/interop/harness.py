"""Real daemons for the tests of clients in any language: their addresses as JSON, and a report of what passed.

Two daemons with the embedded model, relays that hand connections over and cut them, and a gateway with TLS and tokens, which
stands for daemons that ask for them. It knows no client. The interface for a language's tests is in README.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.interop.gateway import Gateway
from tests.interop.relay import Relay

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
SERVES = r"serving .* after "  # in the log of a daemon that answers
START_SECONDS = 240.0
STOP_SECONDS = 60.0
RESTART_SECONDS = 0.1
CUT_AFTER_BYTES = 1500  # of what the server sends: some twenty tokens


class SupervisedDaemon:
    """`hotgraph serve` in a process of its own, which is started again whenever it ends, as a supervisor would."""

    def __init__(self, folder: Path, name: str, *flags: str) -> None:
        self.socket = folder / f"{name}.sock"
        self.target = f"unix:{self.socket}"
        self._log = folder / f"{name}.log"
        self._flags = flags
        self._process: asyncio.subprocess.Process | None = None
        self._failure = ""  # the log of a process that ended without having served

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Returns at once; `wait_serving` waits for it. In the end it must stop well."""
        await self._start()
        supervisor = asyncio.create_task(self._supervise())
        try:
            yield
        finally:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
            await self._stop()

    async def wait_serving(self) -> str:
        """The log once it says that it serves. Raises RuntimeError when it ended or took too long."""
        async with asyncio.timeout(START_SECONDS):
            while not re.search(SERVES, text := self._log.read_text()):
                if self._failure:
                    raise RuntimeError(f"the daemon ended before it served:\n{self._failure}")
                await asyncio.sleep(0.05)
        return text

    async def _start(self) -> None:
        command = [sys.executable, "-m", "hotgraph_server.cli", "serve", "--model", MODEL, "--num-threads", "1"]
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, "--listen", self.target, *self._flags, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    async def _supervise(self) -> None:
        while self._process is not None:
            await self._process.wait()
            log = self._log.read_text()
            if not re.search(SERVES, log):
                self._failure = log
                return
            self._log.write_text("")  # it serves no more
            await asyncio.sleep(RESTART_SECONDS)
            await self._start()

    async def _stop(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            status = await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            raise RuntimeError(f"the daemon did not stop:\n{self._log.read_text()}") from None
        if status != 0:
            raise RuntimeError(f"the daemon ended with {status}:\n{self._log.read_text()}")


class Harness:
    """What the tests are told, and how they are run."""

    def __init__(self, folder: Path, daemons: list[SupervisedDaemon], addresses: dict[str, Any]) -> None:
        self.folder = folder
        self.addresses = folder / "addresses.json"
        self.addresses.write_text(json.dumps(addresses, indent=2) + "\n", encoding="utf-8")
        self._daemons = daemons

    async def wait_serving(self) -> None:
        """Until all daemons serve, also one that was drained just now."""
        await asyncio.gather(*(daemon.wait_serving() for daemon in self._daemons))

    async def run(self, command: list[str], report: Path) -> int:
        """The exit status of a language's tests, which find addresses and report in their environment."""
        told = {"HOTGRAPH_INTEROP": str(self.addresses), "HOTGRAPH_INTEROP_REPORT": str(report)}
        process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **told})
        return await process.wait()


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Harness]:
    """All there is for the tests, in processes and in this one. `folder` is short, since a socket's path is."""
    main = SupervisedDaemon(folder, "main", "--listen", "127.0.0.1:0")
    drained = SupervisedDaemon(folder, "drained")
    async with AsyncExitStack() as stack:
        for daemon in (main, drained):
            await stack.enter_async_context(daemon.running())
        gateway = Gateway(folder, main.target)
        handover = Relay(folder / "handover.sock", [drained.socket, main.socket])
        cut = Relay(folder / "cut.sock", [main.socket], cut_after_bytes=CUT_AFTER_BYTES)
        for context in (gateway, handover, cut):
            await stack.enter_async_context(context.running())
        log, _ = await asyncio.gather(main.wait_serving(), drained.wait_serving())
        address = re.search(r"127\.0\.0\.1:\d+", log)
        assert address is not None, log
        addresses = {
            "model": MODEL,
            "unix": main.target,
            "tcp": address.group(),
            "tls": gateway.tls,
            "mutual_tls": gateway.mutual_tls,
            "handover": {"target": handover.target, "drained": drained.target},
            "cut": cut.target,
            "vectors": str(ROOT / "tests" / "contract" / "vectors.json"),
        }
        yield Harness(folder, [main, drained], addresses)
