"""A process that keeps processor cores awake, run as a script: `python -I -S awake_child.py PARENT_ID CORE...`.

It has a thread for each core, of the idle class (SCHED_IDLE): whatever else wants the core gets it at once. A thread spins in
`pthread_spin_lock` on a lock that is never free, which is a loop of PAUSE or its like and leaves most of the core to its
other hardware thread. SIGSTOP puts it to sleep, SIGCONT wakes it, and it is killed when its parent ends.

It knows nothing of hotgraph and imports nothing of it, so that it starts at once and stays small.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
SPIN_LOCK_BYTES = 64  # a pthread_spinlock_t is an int; on a line of its own nobody else's writes disturb it


def main() -> int:
    """Spins until killed. Returns 1 when the parent is gone already, 71 (EX_OSERR) when the system refuses something."""
    parent_id, *cores = (int(text) for text in sys.argv[1:])
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # meant for the parent, which ends it in its time
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        return _refused(f"PR_SET_PDEATHSIG: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_id:  # it ended before it was to be told of
        return 1
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # which threads inherit
    except OSError as error:
        return _refused(f"SCHED_IDLE: {error}")
    threads = [threading.Thread(target=_spin, args=(libc, core), daemon=True) for core in cores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()  # returns only where a thread could not spin
    return 71


def _spin(libc: ctypes.CDLL, core: int) -> None:
    os.sched_setaffinity(threading.get_native_id(), {core})
    lock = ctypes.create_string_buffer(SPIN_LOCK_BYTES)
    libc.pthread_spin_init(lock, 0)
    libc.pthread_spin_lock(lock)
    libc.pthread_spin_lock(lock)  # for ever; without the interpreter's lock


def _refused(why: str) -> int:
    sys.stderr.write(f"awake_child: {why}\n")
    return 71


if __name__ == "__main__":
    sys.exit(main())
