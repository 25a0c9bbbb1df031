"""The daemon and its child, which spins on processor cores: one is killed, and what becomes of the other.

A spinner that outlived its daemon would keep cores at work for nobody, for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from hotgraph.v1.inference_service_pb2 import GenerateRequest
from hotgraph_server import awake_cores
from tests.integration.harness import Caller, eventually
from tests.reliability.victims import Victim, victim

GONE_SECONDS: Final = 5.0
# Cores may fall asleep a second after the last request: then the child is stopped.
AWAKE: Final = {"server": {"awake_cores": 1, "awake_seconds": 1.0}}


def children_of(process_id: int) -> list[int]:
    """Of all threads: a child is the child of the thread that made it."""
    tasks = Path(f"/proc/{process_id}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def is_alive(process_id: int) -> bool:
    """Whether it can still run. One that nobody has waited for yet is dead."""
    try:
        return state_of(process_id) not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def state_of(process_id: int) -> str:
    """As in ps: R runs, S sleeps, T is stopped, Z is dead."""
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def no_orphan(process_id: int) -> Iterator[None]:
    """However the test ends, the child does."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)


async def spinner_of(daemon: Victim) -> int:
    """Its one child, once it spins."""
    (child,) = children_of(daemon.process_id)
    await eventually(lambda: os.sched_getscheduler(child) == os.SCHED_IDLE)
    return child


async def kill_daemon(is_asleep: bool, number: int, **changes: Any) -> float:
    """Ends the daemon under load, or idle for so long that its child is stopped; the seconds until the child is gone."""
    async with victim(sections=AWAKE, **changes) as daemon:
        child = await spinner_of(daemon)
        with no_orphan(child):
            async with Caller(daemon.address) as caller:
                if is_asleep:
                    await eventually(lambda: state_of(child) == "T")
                else:
                    stream = caller.inference.Generate(GenerateRequest(text="x", max_tokens=900))
                    await stream.read()
                    assert state_of(child) in "RS"
                begin = time.monotonic()
                daemon.process.signal(number)
                # Not by waiting for its log, which an orphan would hold open.
                await eventually(lambda: not is_alive(daemon.process_id))
            await eventually(lambda: not is_alive(child), GONE_SECONDS)
            return time.monotonic() - begin


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
@pytest.mark.parametrize("is_asleep", [False, True], ids=["awake", "asleep"])
async def test_the_spinner_ends_with_its_daemon(is_asleep: bool, number: int) -> None:
    """However the daemon dies, its child is gone within 5 s, also while it is stopped."""
    print(f"gone after {await kill_daemon(is_asleep, number):.3f} s")


async def test_a_spinner_that_stays_is_noticed(tmp_path: Path) -> None:
    """The control: a child that does not ask to be told of its parent's death outlives it, and the test of it fails."""
    text = awake_cores.CHILD.read_text()
    careless = tmp_path / "awake_child.py"
    careless.write_text(text.replace("libc.prctl(PR_SET_PDEATHSIG", "(lambda *_: 0)(PR_SET_PDEATHSIG"))
    assert careless.read_text() != text
    more = f"from pathlib import Path\nfrom hotgraph_server import awake_cores\nawake_cores.CHILD = Path({str(careless)!r})"
    with pytest.raises(AssertionError, match="in time"):
        await kill_daemon(False, signal.SIGKILL, more=more)


async def test_the_daemon_serves_on_without_its_spinner() -> None:
    """When the child is killed the daemon says so, and serves; nothing of it is left, and the daemon ends well."""
    async with victim(sections=AWAKE) as daemon, Caller(daemon.address) as caller:
        child = await spinner_of(daemon)
        os.kill(child, signal.SIGKILL)
        await daemon.process.logged("has ended with status -9", GONE_SECONDS)
        await caller.check_alive()
        assert children_of(daemon.process_id) == []
        daemon.process.signal(signal.SIGTERM)
        assert await daemon.process.ended() == 0


async def test_without_awake_cores_there_are_no_children() -> None:
    """The daemon has no other children, whatever it does: there is nobody else to outlive it."""
    async with victim() as daemon, Caller(daemon.address) as caller:
        await caller.check_alive()
        assert children_of(daemon.process_id) == []
