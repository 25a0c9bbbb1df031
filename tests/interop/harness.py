"""Real daemons for the tests of clients in any language: their addresses as JSON, and a report of what passed.

Two daemons with the embedded model, relays that hand connections over and cut them, and two daemons with the fake engine that
speak TLS: one asks for a token, the other for a certificate. It knows no client. The interface for a language's tests is in
README.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.certificates import make_authority, make_certificate
from tests.interop.relay import Relay

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
SERVES = r"serving .* after "  # in the log of a daemon that answers
START_SECONDS = 240.0
STOP_SECONDS = 60.0
RESTART_SECONDS = 0.1
CUT_AFTER_BYTES = 1500  # of what the server sends: some twenty tokens
NUM_HEADERS_CUT = 2


class SupervisedDaemon:
    """`hotgraph serve` in a process of its own, which is started again whenever it ends, as a supervisor would."""

    def __init__(self, folder: Path, name: str, *flags: str, model: str = MODEL) -> None:
        self.socket = folder / f"{name}.sock"
        self.target = f"unix:{self.socket}"
        self._log = folder / f"{name}.log"
        self._flags = ("--model", model, *flags)
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

    async def wait_port(self) -> int:
        """Of its TCP address on 127.0.0.1, as `wait_serving`."""
        log = await self.wait_serving()
        address = re.search(r"127\.0\.0\.1:(\d+)", log)
        assert address is not None, log
        return int(address.group(1))

    async def _start(self) -> None:
        command = [sys.executable, "-m", "hotgraph_server.cli", "serve", "--num-threads", "1"]
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

    def __init__(
        self, folder: Path, daemons: list[SupervisedDaemon], relays: list[Relay], addresses: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.addresses = folder / "addresses.json"
        self.addresses.write_text(json.dumps(addresses, indent=2) + "\n", encoding="utf-8")
        self._daemons = daemons
        self._relays = relays

    async def wait_serving(self) -> None:
        """Until all daemons serve, also one that was drained just now. Relays count their connections from here."""
        await asyncio.gather(*(daemon.wait_serving() for daemon in self._daemons))
        for relay in self._relays:
            relay.begin_again()

    async def run(self, command: list[str], report: Path) -> int:
        """The exit status of a language's tests, which find addresses and report in their environment."""
        told = {"HOTGRAPH_INTEROP": str(self.addresses), "HOTGRAPH_INTEROP_REPORT": str(report)}
        process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **told})
        return await process.wait()


def make_secrets(folder: Path) -> str:
    """An authority, certificates of a server and a client, and a file of one token, which is returned."""
    make_authority(folder, "ca")
    make_certificate(folder, "server")
    make_certificate(folder, "client", usage="clientAuth", names="DNS:client.test")
    token = secrets.token_urlsafe()
    tokens = folder / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"use interop {token}\n", encoding="utf-8")
    return token


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Harness]:
    """All there is for the tests, in processes and in this one. `folder` is short, since a socket's path is."""
    token = make_secrets(folder)
    certificate = ("--tls-certificate", f"{folder}/server.pem", "--tls-key", f"{folder}/server.key")
    over_tcp = ("--listen", "127.0.0.1:0")
    main = SupervisedDaemon(folder, "main", *over_tcp)
    drained = SupervisedDaemon(folder, "drained")
    # How callers prove who they are is one setting of a daemon, for all its TCP addresses. The model does not matter for it.
    with_token = SupervisedDaemon(
        folder, "token", *over_tcp, *certificate, "--token-file", f"{folder}/tokens", model="fake"
    )
    with_certificate = SupervisedDaemon(
        folder, "certificate", *over_tcp, *certificate, "--tls-client-ca", f"{folder}/ca.pem", model="fake"
    )
    daemons = [main, drained, with_token, with_certificate]
    async with AsyncExitStack() as stack:
        for daemon in daemons:
            await stack.enter_async_context(daemon.running())
        handover = Relay(folder / "handover.sock", [drained.socket, main.socket])
        cut = Relay(folder / "cut.sock", [main.socket], cut_after_bytes=CUT_AFTER_BYTES)
        headers_cut = Relay(folder / "headers.sock", [main.socket], num_headers_cut=NUM_HEADERS_CUT)
        relays = [handover, cut, headers_cut]
        for relay in relays:
            await stack.enter_async_context(relay.running())
        port, token_port, certificate_port, _ = await asyncio.gather(
            main.wait_port(), with_token.wait_port(), with_certificate.wait_port(), drained.wait_serving()
        )
        addresses = {
            "model": MODEL,
            "unix": main.target,
            "tcp": f"127.0.0.1:{port}",
            "tls": {"target": f"localhost:{token_port}", "root_certificates": f"{folder}/ca.pem", "token": token},
            "mutual_tls": {
                "target": f"localhost:{certificate_port}",
                "root_certificates": f"{folder}/ca.pem",
                "certificate_chain": f"{folder}/client.pem",
                "private_key": f"{folder}/client.key",
            },
            "handover": {"target": handover.target, "drained": drained.target},
            "cut": cut.target,
            "headers_cut": headers_cut.target,
            "vectors": str(ROOT / "tests" / "contract" / "vectors.json"),
        }
        yield Harness(folder, daemons, relays, addresses)
