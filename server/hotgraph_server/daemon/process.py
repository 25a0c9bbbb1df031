"""The daemon as a process: its signals, its event loop, and what it says when it cannot run."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal

from hotgraph_server.config import Settings
from hotgraph_server.daemon.daemon import Daemon, LoadSettings
from hotgraph_server.daemon.exit_status import EXIT_STATUSES
from hotgraph_server.daemon.parts import BuildParts, build_parts
from hotgraph_server.errors import AddressInUseError
from hotgraph_server.systemd import Notifier
from hotgraph_server.threads import run_event_loop

logger = logging.getLogger("hotgraph.daemon")


async def serve(
    settings: Settings,
    *,
    build: BuildParts = build_parts,
    load: LoadSettings | None = None,
    notifier: Notifier | None = None,
) -> int:
    """Runs a daemon until it is told to end; SIGTERM and SIGINT drain it. Returns the exit status of the process.

    `load` reads the settings again, for SIGHUP; it may raise SettingsError. `notifier` is by default what the environment
    says. SIGHUP is ignored from the end on.
    """
    loop = asyncio.get_running_loop()
    notifier = Notifier.from_environment() if notifier is None else notifier
    daemon = Daemon(settings, build=build, notifier=notifier, tests_itself=True)
    reloads: set[asyncio.Task[None]] = set()  # or they could be collected half way

    def on_hangup() -> None:
        if load is None:
            logger.warning("SIGHUP: there are no settings to read again")
            return
        reloads.add(task := loop.create_task(daemon.reload(load), name="reload"))
        task.add_done_callback(reloads.discard)

    handlers = {signal.SIGTERM: daemon.on_signal, signal.SIGINT: daemon.on_signal, signal.SIGHUP: on_hangup}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        return await daemon.run()
    except tuple(EXIT_STATUSES) as error:
        logger.error("%s", error.message)
        notifier.failed(error.message, errno.EADDRINUSE if isinstance(error, AddressInUseError) else None)
        return next(status for kind, status in EXIT_STATUSES.items() if isinstance(error, kind))
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
        # A reload that comes too late must not end it: to systemd death by SIGHUP is a clean end, and it would start no other.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        notifier.close()


def run(settings: Settings, *, load: LoadSettings | None = None) -> int:
    """`serve` on an event loop of its own, which is the only one of the process that uses gRPC."""
    return run_event_loop(serve(settings, load=load))
