"""Processor cores that serve and do not fall asleep while requests come.

An idle core sleeps: it lowers its clock, loses its caches, and in a virtual machine goes back to the host. Each thread that a
request passes on its way then starts on a cold core, and a lone request, which passes five of them, is late by a millisecond.
So the threads that serve keep to a few cores, and a child of the idle scheduling class (`awake_child.py`) keeps these busy
whenever nothing else does. What it takes is power: the kernel gives such a core to anyone who wants it.

It knows processors and threads, no requests. Linux only: elsewhere, and where a quota of processor time would be used up by
it, `choose_cores` finds none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from graphcache import Clock

logger = logging.getLogger("hotgraph.cores")

CHILD: Final = Path(__file__).with_name("awake_child.py")
CHECK_SECONDS: Final = 1.0
STOP_SECONDS: Final = 5.0
SYSTEM: Final = Path("/")


class AwakeCores:
    """Keeps a process's threads on some cores, and the cores awake until nothing has come for a while, if somebody watches.

    All methods belong to one thread. A child that cannot run costs speed only, and is logged.
    """

    def __init__(
        self,
        cores: Collection[int],
        *,
        quiet_seconds: float,
        clock: Clock,
        is_busy: Callable[[], bool] = lambda: False,
        spares: Collection[str] = (),
    ) -> None:
        """`cores`: may be none, and then nothing is done. `quiet_seconds`: without a `touch` until they may sleep.

        `is_busy`: whether they are needed without one. `spares`: names of threads that may run on every core.
        """
        self.cores = tuple(sorted(cores))
        self._quiet_seconds = quiet_seconds
        self._clock = clock
        self._is_busy = is_busy
        self._spares = frozenset(spares)
        self._child: subprocess.Popen[bytes] | None = None
        self._is_awake = False
        self._touched_at = 0.0
        self._before: set[int] | None = None  # where the threads could run

    @property
    def is_awake(self) -> bool:
        """Whether the cores are kept awake now."""
        return self._is_awake

    @property
    def process_id(self) -> int | None:
        """Of the child, while there is one."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """The threads that the process has now, and those that they start, keep to the cores from here on; these are awake."""
        if not self.cores:
            return
        self._before = os.sched_getaffinity(0)
        self._keep_threads(self.cores)
        command = [sys.executable, "-I", "-S", str(CHILD), str(os.getpid()), *map(str, self.cores)]
        try:
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except OSError as error:
            logger.warning("cores %s are not kept awake: %s", self, error)
            return
        self._is_awake = True
        self._touched_at = self._clock.monotonic()
        logger.info("cores %s serve, and stay awake for %.0f s after a request", self, self._quiet_seconds)

    def touch(self) -> None:
        """Something came: the cores are awake now and for a while. Costs next to nothing while they are."""
        if self._child is None:
            return
        self._touched_at = self._clock.monotonic()
        if not self._is_awake:
            self._signal(signal.SIGCONT)
            self._is_awake = True

    def close(self) -> None:
        """The cores are left to themselves, and the threads run where they could before."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()  # which a stopped process hears, too
            child.wait(STOP_SECONDS)
            self._is_awake = False
        if self._before is not None:
            self._keep_threads(self._before)
            self._before = None

    def __str__(self) -> str:
        return ", ".join(map(str, self.cores)) or "none"

    async def watch(self) -> None:
        """Lets the cores sleep when it is time, for ever."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            self.check()

    def check(self) -> None:
        """Lets the cores sleep if it has been quiet for long enough."""
        if self._child is None:
            return
        if (status := self._child.poll()) is not None:
            logger.warning("what kept cores %s awake has ended with status %d: they sleep when idle", self, status)
            self._child = None
            self._is_awake = False
        elif self._is_busy():
            self.touch()
        elif self._is_awake and self._clock.monotonic() - self._touched_at >= self._quiet_seconds:
            self._signal(signal.SIGSTOP)
            self._is_awake = False

    def _signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    def _keep_threads(self, cores: Collection[int]) -> None:
        spares = {thread.native_id for thread in threading.enumerate() if thread.name in self._spares}
        for name in os.listdir("/proc/self/task"):
            if int(name) in spares:
                continue
            try:
                os.sched_setaffinity(int(name), cores)
            except ProcessLookupError:
                continue  # it has ended
            except OSError as error:
                logger.warning("thread %s cannot be kept on cores %s: %s", name, sorted(cores), error)


def choose_cores(
    wanted: int | None, *, gpu_address: str | None = None, taken: Collection[int] = (), root: Path = SYSTEM
) -> tuple[int, ...]:
    """As many of the cores that this process may use as are wanted, or all there are of the kind.

    wanted: None takes 4 of 16 or more, 2 of 8 or more, and none below that or without a GPU. One hardware thread of a core,
    not core 0 if it can be helped, which has interrupts to see to; near the GPU (its PCI address, as in "0000:18:00.0"), and
    not those that another GPU's process would choose. taken: cores that somebody else has. root: of /proc and /sys, for tests.
    """
    if wanted == 0 or (wanted is None and gpu_address is None) or not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    if wanted is None:
        if _has_quota(root):
            logger.info("no core is kept awake: this process has a quota of processor time, which that would use up")
            return ()
        wanted = 4 if len(allowed) >= 16 else 2 if len(allowed) >= 8 else 0
        if not wanted:
            return ()
    near = _near(gpu_address, root)
    cores = [core for core in _one_of_each(allowed, root) if core not in taken]
    cores = [core for core in cores if core in near] or cores
    if len(cores) > wanted and cores[0] == 0:
        cores = cores[1:]
    if len(cores) <= wanted:
        return tuple(cores)
    start = _rank(gpu_address, near, root) * wanted % len(cores)
    return tuple(sorted((cores + cores)[start : start + wanted]))


def _has_quota(root: Path) -> bool:
    """Whether a control group above this process limits its processor time."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return False
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            base, name, free = root / "sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "-1"
        else:
            base, name, free = root / "sys/fs/cgroup", "cpu.max", "max"
        parts = Path(path.lstrip("/")).parts
        for length in range(len(parts) + 1):
            try:
                words = base.joinpath(*parts[:length], name).read_text().split()
            except OSError:
                continue  # the topmost has none, and in a container what is above is not to be seen
            if words and words[0] != free:
                return True
    return False


def _one_of_each(cores: Sequence[int], root: Path) -> list[int]:
    """The first hardware thread of each core."""
    found: list[int] = []
    seen: set[int] = set()
    for core in cores:
        if core not in seen:
            found.append(core)
            seen |= _core_list(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") | {core}
    return found


def _near(gpu_address: str | None, root: Path) -> set[int]:
    """Cores of the GPU's own memory node; none where that is not known."""
    return set() if gpu_address is None else _core_list(root / f"sys/bus/pci/devices/{gpu_address}/local_cpulist")


def _rank(gpu_address: str | None, near: set[int], root: Path) -> int:
    """The GPU's place among those that have the same cores near, which other processes may serve."""
    if gpu_address is None:
        return 0
    try:
        addresses = sorted(path.name for path in (root / "sys/bus/pci/drivers/nvidia").iterdir() if ":" in path.name)
    except OSError:
        return 0
    return sum(address < gpu_address and _near(address, root) == near for address in addresses)


def _core_list(path: Path) -> set[int]:
    """What the kernel writes as "0-3,8"; nothing of a file that is not there."""
    try:
        text = path.read_text().strip()
    except OSError:
        return set()
    cores: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
