"""Addresses as settings spell them, and the claim on a Unix socket's path."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotgraph_server.errors import AddressInUseError, SettingsError
from hotgraph_server.rpc.addresses import (
    TcpAddress,
    UnixAddress,
    UnixSocketClaim,
    bind_error,
    parse_address,
    private_umask,
)


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        yield Path(folder) / "s"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:a.sock", UnixAddress(Path("a.sock"))),
        ("unix:/run/a.sock", UnixAddress(Path("/run/a.sock"))),
        ("unix:///run/a.sock", UnixAddress(Path("/run/a.sock"))),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("0.0.0.0:65535", TcpAddress("0.0.0.0", 65535)),
        ("[::1]:50051", TcpAddress("::1", 50051)),
    ],
)
def test_address_is_parsed(text: str, address: UnixAddress | TcpAddress) -> None:
    """Each spelling of the settings is understood."""
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":1", "host", "host:", "host:x", "host:65536", "host:-1", "::1:5", "unix:", "unix://a", "unix:a\0b", "host:١"],
)
def test_nonsense_is_no_address(text: str) -> None:
    """What is no address is a SettingsError."""
    with pytest.raises(SettingsError):
        parse_address(text)


def test_path_length_is_the_kernels() -> None:
    """107 bytes are allowed, 108 are not; bytes, not characters."""
    assert parse_address("unix:" + "x" * 107) == UnixAddress(Path("x" * 107))
    for path in ("x" * 108, "ä" * 54):
        with pytest.raises(SettingsError):
            parse_address(f"unix:{path}")


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_is_known(host: str, is_loopback: bool) -> None:
    """Only addresses of this host count as loopback; a name of any other host does not."""
    assert TcpAddress(host, 1).is_loopback is is_loopback
    assert not TcpAddress("example.org", 1).is_loopback


def test_claim_is_exclusive_until_released(path: Path) -> None:
    """A second claim fails while the first is held, succeeds after it, and nothing is left in the folder."""
    first, second = UnixSocketClaim(UnixAddress(path)), UnixSocketClaim(UnixAddress(path))
    first.acquire()
    with pytest.raises(AddressInUseError):
        second.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()
    assert os.listdir(path.parent) == []


def test_stale_socket_is_removed_and_a_live_one_is_not(path: Path) -> None:
    """A socket nobody listens on makes way; one with a listener stays, and so does its path."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(AddressInUseError):
            UnixSocketClaim(UnixAddress(path)).acquire()
        assert path.is_socket()
    claim = UnixSocketClaim(UnixAddress(path))
    claim.acquire()
    assert not path.exists()
    claim.release()


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.mkdir()], ids=["file", "folder"])
def test_what_is_no_socket_stays(path: Path, make: object) -> None:
    """A file or folder in the way is an error and is left alone, and so is a dangling link."""
    make(path)  # type: ignore[operator]
    with pytest.raises(SettingsError):
        UnixSocketClaim(UnixAddress(path)).acquire()
    assert path.exists()


def test_dangling_link_is_no_socket(path: Path) -> None:
    """A link that leads nowhere is not followed."""
    path.symlink_to("/nonexistent/target")
    with pytest.raises(SettingsError):
        UnixSocketClaim(UnixAddress(path)).acquire()
    assert path.is_symlink()


def test_folder_that_is_not_there_is_a_bad_setting(path: Path) -> None:
    """No folder is made for the socket."""
    with pytest.raises(SettingsError):
        UnixSocketClaim(UnixAddress(path / "deeper" / "s")).acquire()


@pytest.mark.parametrize(
    ("before", "access", "mode"),
    [
        (0o022, "auto", 0o640),
        (0o002, "auto", 0o660),
        (0o077, "auto", 0o600),
        (0o000, "auto", 0o660),
        (0o077, "group", 0o660),
        (0o000, "owner", 0o600),
    ],
)
def test_sockets_made_inside_are_private(path: Path, before: int, access: str, mode: int) -> None:
    """Others get nothing, the group what the setting or the process's umask allows, and the umask is restored."""
    outer = os.umask(before)
    try:
        with private_umask(access), socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
        assert path.stat().st_mode & 0o777 == mode
        assert os.umask(before) == before
    finally:
        os.umask(outer)


def test_bind_error_tells_why() -> None:
    """A taken port is in use; an address that is not this host's is a bad setting."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert isinstance(bind_error(TcpAddress("127.0.0.1", other.getsockname()[1])), AddressInUseError)
    assert isinstance(bind_error(TcpAddress("192.0.2.1", 1)), SettingsError)
