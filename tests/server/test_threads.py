"""Tests of threads.py: the loop, and blocking work beside it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from hotgraph_server.threads import SWITCH_INTERVAL_SECONDS, in_daemon_thread, run_event_loop


async def test_it_gives_what_the_work_gives() -> None:
    """The result comes back, and so does what the work raises, while the loop goes on; the thread has its name."""
    names: list[str] = []

    def work() -> int:
        names.append(threading.current_thread().name)
        return 7

    def fail() -> None:
        raise LookupError("gone")

    assert await in_daemon_thread(work, name="worker") == 7
    assert names == ["worker"]
    with pytest.raises(LookupError, match="gone"):
        await in_daemon_thread(fail)


async def test_who_waits_no_more_is_not_told() -> None:
    """Work goes on after its caller left, and its end disturbs nobody."""
    gate, ended = threading.Event(), threading.Event()

    def work() -> None:
        gate.wait(10)
        ended.set()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(in_daemon_thread(work), 0.05)
    gate.set()
    assert ended.wait(10)
    await asyncio.sleep(0.05)


def test_a_loop_of_its_own_has_threads_take_turns_often() -> None:
    """The coroutine's result comes back from a uvloop, in an interpreter whose threads wait little for each other."""

    async def main() -> tuple[str, float]:
        return type(asyncio.get_running_loop()).__module__, sys.getswitchinterval()

    before = sys.getswitchinterval()
    try:
        module, seconds = run_event_loop(main())
    finally:
        sys.setswitchinterval(before)
    assert module.startswith("uvloop")
    assert seconds == pytest.approx(SWITCH_INTERVAL_SECONDS)


PROGRAM = """
import asyncio, threading, uvloop
from hotgraph_server.threads import in_daemon_thread

async def main():
    try:
        await asyncio.wait_for(in_daemon_thread(threading.Event().wait), 0.05)
    except TimeoutError:
        print("left", flush=True)

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


def test_stuck_work_keeps_no_process_alive() -> None:
    """A process whose work never ends ends all the same."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "left\n"
