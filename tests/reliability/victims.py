"""A daemon in a process of its own, over a fake engine, with defences that a test may take away; and what it holds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hotgraph_server.config import ModelSettings, SchedulerSettings, ServerSettings, Settings
from tests.integration.harness import PATIENCE_SECONDS, Caller, eventually
from tests.integration.processes import Process, process

ROOT: Final = Path(__file__).parents[2]

PROGRAM: Final = """
import importlib, logging, sys
sys.path.insert(0, {root!r})
from hotgraph_server.config import Settings
from hotgraph_server import daemon
from hotgraph_server.engine import FakeEngine
from hotgraph_server.rpc import server
from hotgraph_server.text import ByteTokenizer
logging.basicConfig(level=logging.INFO, stream=sys.stderr)

for path, value in {patches!r}.items():
    module, name = path.split(":")
    module = importlib.import_module(module)
    assert hasattr(module, name), path
    setattr(module, name, value)

own = server.channel_options
changes = {options!r}

def options(settings):
    found = dict(own(settings))
    assert set(changes) <= set(found), "a change of an option that the server does not set"
    return [(name, value) for name, value in (found | changes).items() if value is not None]

server.channel_options = options

def load():
    return Settings.model_validate_json(sys.argv[1])
{more}

async def build(settings, clock):
    engine = FakeEngine(
        clock=clock,
        step_seconds={step_seconds!r},
        num_slots=settings.scheduler.num_slots,
        num_blocks=1 + 64 * settings.scheduler.num_slots,
    )
    return daemon.Parts(engine, ByteTokenizer(), "fake")

daemon.serve.__kwdefaults__["build"] = build
sys.exit(daemon.run(load(), load=load))
"""


def program(
    *,
    step_seconds: float = 0.005,
    options: Mapping[str, int | None] | None = None,
    patches: Mapping[str, object] | None = None,
    more: str = "",
) -> str:
    """What the process runs. `options`: channel options changed, or with None left out; `patches`: values of constants, by
    `module:NAME`; `more`: statements before the daemon starts; they may define
    another `load`, which reads the settings now and at SIGHUP."""
    return PROGRAM.format(
        root=str(ROOT), step_seconds=step_seconds, options=dict(options or {}), patches=dict(patches or {}), more=more
    )


@dataclass(frozen=True)
class Victim:
    """A serving daemon."""

    address: str
    process: Process

    @property
    def process_id(self) -> int:
        return self.process.process.pid

    @property
    def resident_bytes(self) -> int:
        """Memory of the daemon, as the kernel counts it."""
        pages = Path(f"/proc/{self.process_id}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def num_files(self) -> int:
        """Descriptors that the daemon has open."""
        return len(os.listdir(f"/proc/{self.process_id}/fd"))


def settings(folder: str, *, is_tcp: bool = True, **sections: Any) -> Settings:
    """A fake model on TCP, or on a socket in `folder`."""
    server = {"listen": ("127.0.0.1:0",) if is_tcp else (f"unix:{folder}/s",), "drain_grace_seconds": 0.0}
    return Settings(
        model=ModelSettings(source="fake"),
        server=ServerSettings(**(server | sections.pop("server", {}))),
        scheduler=SchedulerSettings(**({"num_slots": 64} | sections.pop("scheduler", {}))),
        **sections,
    )


@asynccontextmanager
async def victim(
    *, is_tcp: bool = True, sections: Mapping[str, Any] | None = None, **changes: Any
) -> AsyncIterator[Victim]:
    """A daemon that serves; `changes` as of `program`. Killed in the end."""
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        async with process(settings(folder, is_tcp=is_tcp, **(sections or {})), program(**changes)) as running:
            address = (await running.logged("listening on")).rpartition(" ")[2]
            await running.logged("serving fake")
            yield Victim(address, running)


async def is_free(caller: Caller, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Waits until no request holds anything of the daemon."""
    await eventually(caller.is_all_free, patience_seconds)
