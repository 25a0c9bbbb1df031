"""Messages to the service manager: the notify protocol of systemd over one datagram socket, without its library.

It knows how a message is written and sent; when one is due is `supervision.py`'s matter. Without NOTIFY_SOCKET, as when
somebody runs the daemon by hand, it sends nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

logger = logging.getLogger("hotgraph.systemd")

MAX_STATUS_CHARACTERS = 400


class Notifier:
    """Sends to the service manager. Never blocks and never raises: a supervisor that does not listen stops no service.

    `path` is the value of NOTIFY_SOCKET, "@" first for an abstract one; None sends nothing. `watchdog_seconds`: the
    longest time between two of `alive` that the manager allows; None when it does not watch.
    """

    def __init__(self, path: str | None = None, watchdog_seconds: float | None = None) -> None:
        self.watchdog_seconds = watchdog_seconds
        self._address = None if path is None else ("\0" + path[1:] if path.startswith("@") else path)
        self._socket = None if path is None else socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._has_failed = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Notifier:
        """As NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID say; without the first one that sends nothing."""
        environment = os.environ if environment is None else environment
        path = environment.get("NOTIFY_SOCKET")
        if not path or path[0] not in "/@":
            return cls()
        return cls(path, _watchdog_seconds(environment))

    @property
    def is_listened_to(self) -> bool:
        """Whether there is a manager to tell."""
        return self._socket is not None

    def status(self, text: str) -> None:
        """One line for people: `systemctl status` shows it."""
        self._send(STATUS=_line(text))

    def ready(self, text: str) -> None:
        """The service serves: the start, or a reload, is over."""
        self._send(READY="1", STATUS=_line(text))

    def reloading(self) -> None:
        """A reload begins; `ready` must follow, however it ends."""
        self._send(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))

    def stopping(self, text: str, seconds: float) -> None:
        """The service ends, and may take this long for it."""
        self._send(STOPPING="1", STATUS=_line(text), EXTEND_TIMEOUT_USEC=_microseconds(seconds))

    def extend(self, seconds: float) -> None:
        """The start may take at least that much longer from now. It also holds the watchdog off: not while serving."""
        self._send(EXTEND_TIMEOUT_USEC=_microseconds(seconds))

    def failed(self, text: str, error_number: int | None = None) -> None:
        """Why the service ends by itself; stands there after it ended. `error_number` is one of `errno`."""
        fields = {} if error_number is None else {"ERRNO": str(error_number)}
        self._send(STATUS=_line(text), **fields)

    def alive(self) -> None:
        """For the watchdog: all is well just now."""
        self._send(WATCHDOG="1")

    def close(self) -> None:
        """Sends nothing from now on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, **fields: str) -> None:
        if self._socket is None or self._address is None:
            return
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as error:
            if not self._has_failed:  # once: it would come again each second
                self._has_failed = True
                logger.warning("the service manager cannot be told anything: %s", error)
        else:
            self._has_failed = False


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """None when the manager does not watch, or watches another process."""
    watched = environment.get("WATCHDOG_PID")
    microseconds = environment.get("WATCHDOG_USEC", "")
    if (watched and watched != str(os.getpid())) or not microseconds.isdecimal() or not int(microseconds):
        return None
    return int(microseconds) / 1e6


def _microseconds(seconds: float) -> str:
    return str(max(1, int(seconds * 1e6)))


def _line(text: str) -> str:
    """One line, whatever the text: a line break would begin another field."""
    return " ".join(text.split())[:MAX_STATUS_CHARACTERS]
