"""Where to listen: addresses as the settings spell them, and the lock that keeps two daemons off one Unix socket."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from hotgraph_server.errors import AddressInUseError, SettingsError

MAX_UNIX_PATH_BYTES = 107  # of sockaddr_un, less the closing zero


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """`port` 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:  # a name, which may be any host's
            return False


def parse_address(text: str) -> UnixAddress | TcpAddress:
    """unix:PATH, unix:///PATH or HOST:PORT. Raises SettingsError."""
    if text.startswith("unix:"):
        return _parse_unix(text)
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"no address to listen on: {text!r}; say unix:PATH or HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise SettingsError(f"an IPv6 address stands in brackets: {text!r}")
    return TcpAddress(host, int(port))


def _parse_unix(text: str) -> UnixAddress:
    path = text.removeprefix("unix:")
    if path.startswith("//"):
        path = path.removeprefix("//")
        if not path.startswith("/"):
            raise SettingsError(f"after unix:// the path is absolute: {text!r}")
    if not path or "\0" in path:
        raise SettingsError(f"no path of a socket: {text!r}")
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise SettingsError(f"a socket's path holds at most {MAX_UNIX_PATH_BYTES} bytes: {path!r}")
    return UnixAddress(Path(path))


class UnixSocketClaim:
    """The right to a socket's path, held by a lock on PATH.lock. Without it a second daemon would take a live socket over."""

    def __init__(self, address: UnixAddress) -> None:
        self._path = address.path
        self._lock_path = Path(f"{address.path}.lock")
        self._lock: int | None = None
        self._is_path_ours = False

    def acquire(self) -> None:
        """Takes the lock and clears a stale socket away.

        Raises AddressInUseError when another process has it, SettingsError when no socket can be there.
        """
        self._lock = self._locked()
        try:
            self._clear_path()
        except BaseException:
            self.release()
            raise
        self._is_path_ours = True

    def release(self) -> None:
        """Gives the path back; the socket file goes with it. May be called twice."""
        if self._lock is None:
            return
        try:
            if self._is_path_ours and self._is_socket():
                self._path.unlink()
            self._lock_path.unlink(missing_ok=True)  # while locked: whoever waits for it sees that it is gone
        finally:
            os.close(self._lock)
            self._lock = None

    def _locked(self) -> int:
        while True:
            try:
                lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise SettingsError(f"cannot listen on {self._path}: {error.strerror}") from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise AddressInUseError(f"another daemon serves on {self._path}") from None
            if self._is_same_file(lock):
                return lock
            os.close(lock)  # its owner ended and removed it between our open and our lock

    def _is_same_file(self, lock: int) -> bool:
        try:
            return os.path.samestat(os.fstat(lock), os.stat(self._lock_path))
        except FileNotFoundError:
            return False

    def _clear_path(self) -> None:
        if not os.path.lexists(self._path):
            return
        if not self._is_socket():
            raise SettingsError(f"{self._path} is there and is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self._path))
            except (ConnectionRefusedError, FileNotFoundError):
                self._path.unlink(missing_ok=True)  # stale: nobody listens
                return
            except OSError as error:
                raise AddressInUseError(f"{self._path} is in use: {error.strerror or error}") from error
        raise AddressInUseError(f"another process listens on {self._path}")

    def _is_socket(self) -> bool:
        try:
            return stat.S_ISSOCK(os.lstat(self._path).st_mode)
        except FileNotFoundError:
            return False


@contextmanager
def private_umask(access: str) -> Iterator[None]:
    """Sockets made inside are never for others; for the group if `access` is "group", or "auto" and the umask allows it.

    The mode must be right at the moment of bind: a later chmod leaves a gap. The umask is the whole process's, so this is
    for the moment before any other thread makes files.
    """
    before = os.umask(0o177)
    try:
        os.umask({"auto": before | 0o117, "group": 0o117, "owner": 0o177}[access])
        yield
    finally:
        os.umask(before)


def bind_error(address: TcpAddress) -> AddressInUseError | SettingsError:
    """Why gRPC could not bind it; gRPC itself does not tell, so it is tried once more."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return AddressInUseError(f"another process listens on {address}")
        return SettingsError(f"cannot listen on {address}: {error.strerror or error}")
    return AddressInUseError(f"cannot listen on {address}")
