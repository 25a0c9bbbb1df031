"""Cores that stay awake: which are chosen, and the child that keeps them so, on the real system."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from graphcache import FakeClock, SystemClock
from hotgraph_server.awake_cores import CHILD, AwakeCores, choose_cores

GPU = "0000:18:00.0"
OTHER_GPU = "0000:2a:00.0"
FAR_GPU = "0000:90:00.0"
CORE = min(os.sched_getaffinity(0))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/proc and /sys of 32 hardware threads, n and n + 16 of one core, on two memory nodes, with two GPUs near the first."""
    for core in range(32):
        write(
            tmp_path / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list",
            f"{core % 16},{core % 16 + 16}",
        )
    for address, cores in ((GPU, "0-7,16-23"), (OTHER_GPU, "0-7,16-23"), (FAR_GPU, "8-15,24-31")):
        write(tmp_path / f"sys/bus/pci/devices/{address}/local_cpulist", cores)
        write(tmp_path / f"sys/bus/pci/drivers/nvidia/{address}", "")
    write(tmp_path / "proc/self/cgroup", "0::/system.slice/hotgraph.service")
    write(tmp_path / "sys/fs/cgroup/system.slice/cpu.max", "max 100000")
    write(tmp_path / "sys/fs/cgroup/system.slice/hotgraph.service/cpu.max", "max 100000")
    allow(monkeypatch, range(32))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def allow(monkeypatch: pytest.MonkeyPatch, cores: Iterable[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))


def test_cores_of_a_large_host(host: Path) -> None:
    """Four, one of each core, near the GPU, without the first, and others than the next GPU's."""
    assert choose_cores(None, gpu_address=GPU, root=host) == (1, 2, 3, 4)
    assert set(choose_cores(3, gpu_address=GPU, root=host)).isdisjoint(
        choose_cores(3, gpu_address=OTHER_GPU, root=host)
    )
    assert choose_cores(None, gpu_address=FAR_GPU, root=host) == (8, 9, 10, 11)


def test_what_is_wanted_is_chosen(host: Path) -> None:
    """A number is taken as it is, with or without a GPU, and no more than there are; 0 is none."""
    assert choose_cores(2, root=host) == (1, 2)
    assert choose_cores(0, gpu_address=GPU, root=host) == ()
    assert choose_cores(64, gpu_address=GPU, root=host) == (0, 1, 2, 3, 4, 5, 6, 7)


def test_none_without_a_gpu(host: Path) -> None:
    """Where steps take long nothing is burnt for what a core's sleep costs."""
    assert choose_cores(None, root=host) == ()


@pytest.mark.parametrize(("num_allowed", "num_chosen"), [(4, 0), (7, 0), (8, 2), (15, 2), (16, 4)])
def test_small_hosts(num_allowed: int, num_chosen: int, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewer there are, the fewer are kept; all of them are of those that the process may use."""
    allow(monkeypatch, range(8, 8 + num_allowed))
    chosen = choose_cores(None, gpu_address=FAR_GPU, root=host)
    assert len(chosen) == num_chosen
    assert set(chosen) <= set(range(8, 8 + num_allowed))


def test_cores_far_from_the_gpu(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may use none of those near takes what it may use."""
    allow(monkeypatch, range(8, 16))
    assert choose_cores(2, gpu_address=GPU, root=host) == (8, 9)


@pytest.mark.parametrize("group", ["system.slice", "system.slice/hotgraph.service"])
def test_none_under_a_quota(group: str, host: Path) -> None:
    """Under a quota of processor time, its own or one above it, there are none; a number still counts."""
    write(host / f"sys/fs/cgroup/{group}/cpu.max", "400000 100000")
    assert choose_cores(None, gpu_address=GPU, root=host) == ()
    assert choose_cores(2, gpu_address=GPU, root=host) == (1, 2)


@pytest.mark.parametrize(("quota", "num_chosen"), [("-1", 4), ("200000", 0)])
def test_a_quota_of_the_first_kind_of_groups(quota: str, num_chosen: int, host: Path) -> None:
    """The older files of control groups are understood, too."""
    write(host / "proc/self/cgroup", "5:memory:/box\n4:cpu,cpuacct:/box")
    write(host / "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", quota)
    assert len(choose_cores(None, gpu_address=GPU, root=host)) == num_chosen


def test_cores_that_others_have(host: Path) -> None:
    """What is taken is left out, far from the GPU before twice."""
    first = choose_cores(None, gpu_address=GPU, root=host)
    second = choose_cores(3, gpu_address=GPU, taken=first, root=host)
    assert second == (5, 6, 7)
    assert choose_cores(2, gpu_address=GPU, taken=range(8), root=host) == (8, 9)


def test_a_host_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any of the files there are cores all the same."""
    allow(monkeypatch, range(16))
    assert choose_cores(None, gpu_address=GPU, root=tmp_path) == (1, 2, 3, 4)


def processor_seconds(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def state(process_id: int) -> str:
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


async def until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_true():  # noqa: ASYNC110 what is waited for is another process's
            await asyncio.sleep(0.02)


async def spinner(process_id: int) -> int:
    """The child's thread that spins, once there is one."""
    await until(lambda: len(os.listdir(f"/proc/{process_id}/task")) == 2)
    return next(int(name) for name in os.listdir(f"/proc/{process_id}/task") if int(name) != process_id)


async def test_they_are_awake_until_it_is_quiet() -> None:
    """The child computes at idle priority on its core while something comes, sleeps when nothing does, and wakes again."""
    clock = FakeClock()
    is_busy = False
    cores = AwakeCores([CORE], quiet_seconds=10.0, clock=clock, is_busy=lambda: is_busy)
    cores.start()
    try:
        child = cores.process_id
        assert child is not None
        thread = await spinner(child)
        await until(lambda: os.sched_getaffinity(thread) == {CORE})
        assert os.sched_getscheduler(thread) == os.SCHED_IDLE
        before = processor_seconds(child)
        await until(lambda: processor_seconds(child) > before)

        clock.advance(9.0)
        cores.check()
        assert cores.is_awake
        is_busy = True
        clock.advance(9.0)
        cores.check()
        is_busy = False
        clock.advance(9.0)
        cores.check()
        assert cores.is_awake
        clock.advance(1.0)
        cores.check()
        assert not cores.is_awake
        await until(lambda: state(child) == "T")
        before = processor_seconds(child)
        await asyncio.sleep(0.2)
        assert processor_seconds(child) == before

        cores.touch()
        assert cores.is_awake
        await until(lambda: processor_seconds(child) > before)
    finally:
        cores.close()
    assert not cores.is_awake
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


async def test_a_child_that_sleeps_is_ended_too() -> None:
    """`close` ends the child while it is stopped."""
    clock = FakeClock()
    cores = AwakeCores([CORE], quiet_seconds=1.0, clock=clock)
    cores.start()
    child = cores.process_id
    assert child is not None
    clock.advance(2.0)
    cores.check()
    await until(lambda: state(child) == "T")
    cores.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


async def test_threads_keep_to_the_cores() -> None:
    """Threads that are there and those they start keep to them, but for the spares, until it is over."""
    everywhere = os.sched_getaffinity(0)
    end = threading.Event()
    found: dict[str, list[set[int]]] = {}
    looked = threading.Barrier(4)

    def own(name: str) -> None:
        looked.wait()
        found[name] = [os.sched_getaffinity(0)]
        looked.wait()
        end.wait()
        found[name].append(os.sched_getaffinity(0))

    threads = [threading.Thread(target=own, args=(name,), name=name) for name in ("serving", "spare")]
    for thread in threads:
        thread.start()
    cores = AwakeCores([CORE], quiet_seconds=1.0, clock=SystemClock(), spares=["spare"])
    cores.start()
    threads.append(threading.Thread(target=own, args=("later",), name="later"))
    threads[-1].start()
    looked.wait()
    looked.wait()
    cores.close()
    end.set()
    for thread in threads:
        thread.join()
    assert found == {"serving": [{CORE}, everywhere], "later": [{CORE}, everywhere], "spare": [everywhere, everywhere]}


async def test_none_is_nothing() -> None:
    """Without cores there is no child, threads stay as they are, and everything may be called all the same."""
    before = os.sched_getaffinity(0)
    cores = AwakeCores([], quiet_seconds=1.0, clock=SystemClock())
    cores.start()
    cores.touch()
    cores.check()
    assert cores.process_id is None
    assert not cores.is_awake
    assert os.sched_getaffinity(0) == before
    cores.close()


async def test_a_child_that_dies_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """When the child is killed there is one warning, and requests come as before."""
    cores = AwakeCores([CORE], quiet_seconds=1.0, clock=SystemClock())
    cores.start()
    child = cores.process_id
    assert child is not None
    os.kill(child, signal.SIGKILL)
    with caplog.at_level(logging.WARNING, "hotgraph.cores"):
        await until(lambda: is_noticed(cores))
        cores.touch()
        cores.check()
    assert [record.getMessage() for record in caplog.records] == [
        f"what kept cores {CORE} awake has ended with status -9: they sleep when idle"
    ]
    assert not cores.is_awake
    cores.close()


def is_noticed(cores: AwakeCores) -> bool:
    cores.check()
    return cores.process_id is None


async def test_a_child_that_cannot_start_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no child can be made the daemon serves without."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    cores = AwakeCores([CORE], quiet_seconds=1.0, clock=SystemClock())
    cores.start()
    cores.touch()
    assert not cores.is_awake
    assert "are not kept awake" in caplog.text
    cores.close()


async def test_the_child_ends_with_its_parent() -> None:
    """A daemon that is killed leaves nothing behind that spins."""
    program = (
        "import subprocess, sys, os, time\n"
        f"child = subprocess.Popen([sys.executable, '-I', '-S', {str(CHILD)!r}, str(os.getpid()), '{CORE}'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    await spinner(child)
    parent.kill()
    await until(lambda: not is_alive(child))
    await parent.wait()


def is_alive(process_id: int) -> bool:
    """Not ended, and not only waiting to be told of."""
    try:
        return state(process_id) not in "ZX"
    except FileNotFoundError:
        return False


async def test_what_is_meant_for_the_parent_does_not_end_the_child() -> None:
    """Ctrl-C and a service manager's SIGTERM reach all processes; the parent decides when this one ends."""
    cores = AwakeCores([CORE], quiet_seconds=1.0, clock=SystemClock())
    cores.start()
    child = cores.process_id
    assert child is not None
    await spinner(child)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child, number)
    before = processor_seconds(child)
    await until(lambda: processor_seconds(child) > before)
    cores.check()
    assert cores.process_id == child
    cores.close()


def test_a_child_without_its_parent_ends_at_once() -> None:
    """Whoever started it may be gone before it asks to be told."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(CHILD), "1", str(CORE)], capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 1
