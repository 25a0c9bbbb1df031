"""What a process may do, tried out: prints names and outcomes ("done", or the error's name) as JSON. Needs only Python."""

import ctypes
import errno
import json
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

libc = ctypes.CDLL(None, use_errno=True)
outcomes: dict[str, str] = {}


def tried(name: str) -> Callable[[Callable[[], None]], None]:
    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except OSError as error:
            outcomes[name] = errno.errorcode.get(error.errno or 0, str(error))
        else:
            outcomes[name] = "done"

    return run


def call(number: int) -> None:
    if number == -1:
        raise OSError(ctypes.get_errno(), "")


@tried("write to /usr")
def _() -> None:
    os.close(os.open("/usr/probe", os.O_CREAT | os.O_WRONLY))


@tried("write to /etc")
def _() -> None:
    os.close(os.open("/etc/probe", os.O_CREAT | os.O_WRONLY))


@tried("write to its state")
def _() -> None:
    os.close(os.open("/var/lib/hotgraph/probe", os.O_CREAT | os.O_WRONLY))


@tried("see home folders")
def _() -> None:
    os.listdir("/root")


@tried("open another device")
def _() -> None:
    os.close(os.open("/dev/fuse", os.O_RDWR))


@tried("open /dev/null")
def _() -> None:
    os.close(os.open("/dev/null", os.O_RDWR))


@tried("reach the network")
def _() -> None:
    with socket.create_connection(("192.0.2.1", int(sys.argv[1])), timeout=1):
        pass


@tried("reach loopback")
def _() -> None:
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=1):
        pass


@tried("open a packet socket")
def _() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()


@tried("open a netlink socket")
def _() -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()


@tried("see other processes")
def _() -> None:
    os.listdir("/proc/1")


@tried("trace a process")
def _() -> None:
    child = os.fork()
    if not child:
        ctypes.set_errno(0)
        os._exit(ctypes.get_errno() if libc.ptrace(0, 0, None, None) == -1 else 0)
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if number:
        raise OSError(number, "")


@tried("make a namespace")
def _() -> None:
    call(libc.unshare(0x20000))


@tried("mount")
def _() -> None:
    call(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))


@tried("be scheduled in real time")
def _() -> None:
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def run_from(folder: str) -> None:
    path = folder + "/program"
    with open(path, "w") as file:
        file.write("#!/bin/sh\n")
    os.chmod(path, 0o755)
    try:
        subprocess.run([path], check=True)
    finally:
        os.unlink(path)


for folder in ("/var/lib/hotgraph", "/run/hotgraph", "/tmp", "/var/tmp", "/var/cache/hotgraph"):
    tried("run a program from " + folder)(partial(run_from, folder))


@tried("map code it writes")
def _() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


@tried("choose its processors")
def _() -> None:
    os.sched_setaffinity(0, os.sched_getaffinity(0))


# Last: outside it cannot be taken back, and the clock, which is the host's, must not be set there.
@tried("become root")
def _() -> None:
    os.setuid(0) if os.getuid() else os.setuid(1)


@tried("set the clock")
def _() -> None:
    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME))


print("outcomes " + json.dumps(outcomes), flush=True)
