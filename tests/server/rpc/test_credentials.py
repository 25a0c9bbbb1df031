"""Files of certificates and tokens: what is used, what is refused before it is used, and what may listen where."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hotgraph_server.config import ServerSettings
from hotgraph_server.errors import SettingsError
from hotgraph_server.rpc import credentials as module
from hotgraph_server.rpc.addresses import parse_address
from hotgraph_server.rpc.credentials import check_exposure, load_credentials
from tests.certificates import make_authority, make_certificate

TOKENS = "use alice SECRET-SECRET-SECRET\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_authority(folder, "ca")
    make_certificate(folder, "server")
    make_certificate(folder, "other")
    make_certificate(folder, "expired", days=-1)
    make_certificate(folder, "client", usage="clientAuth")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Good files under the names that `settings` uses."""
    for source, name, mode in (
        ("server.pem", "tls.crt", 0o644),
        ("server.key", "tls.key", 0o600),
        ("ca.pem", "ca.crt", 0o644),
    ):
        (tmp_path / name).write_bytes((made / source).read_bytes())
        (tmp_path / name).chmod(mode)
    (tmp_path / "tokens").write_text(TOKENS)
    (tmp_path / "tokens").chmod(0o600)
    return tmp_path


def settings(folder: Path | str) -> ServerSettings:
    folder = Path(folder)
    return ServerSettings(
        tls_certificate=folder / "tls.crt",
        tls_key=folder / "tls.key",
        tls_client_ca=folder / "ca.crt",
        token_file=folder / "tokens",
    )


def test_good_files_are_read(folder: Path, made: Path) -> None:
    """All four files; without settings there is nothing to read."""
    loaded = load_credentials(settings(folder))
    assert loaded.tls is not None
    assert loaded.tokens is not None
    assert loaded.tls.key == (made / "server.key").read_bytes()
    assert loaded.tokens.find("SECRET-SECRET-SECRET") is not None
    assert "PRIVATE" not in repr(loaded)
    nothing = load_credentials(ServerSettings())
    assert nothing.tls is None
    assert nothing.tokens is None


@pytest.mark.parametrize("start", ["$CREDENTIALS_DIRECTORY", "${CREDENTIALS_DIRECTORY}"])
def test_credentials_directory(folder: Path, start: str) -> None:
    """The variable of systemd is understood at a path's beginning; without it the error says so."""
    assert load_credentials(settings(start), {"CREDENTIALS_DIRECTORY": str(folder)}) == load_credentials(
        settings(folder)
    )
    with pytest.raises(SettingsError, match="CREDENTIALS_DIRECTORY is not set"):
        load_credentials(settings(start), {})


def put(source: str, name: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, made: Path) -> None:
        (folder / name).write_bytes((made / source).read_bytes())

    return change


def put_pair(source: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, made: Path) -> None:
        put(f"{source}.pem", "tls.crt")(folder, made)
        put(f"{source}.key", "tls.key")(folder, made)

    return change


def put_text(name: str, data: bytes) -> Callable[[Path, Path], None]:
    def change(folder: Path, made: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def put_folder(folder: Path, made: Path) -> None:
    (folder / "tokens").unlink()
    (folder / "tokens").mkdir()


BAD: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "key of another": (put("other.key", "tls.key"), r"tls\.crt is of no use for TLS: .*mismatch"),
    "out of date": (put_pair("expired"), "tls.crt is of no use: certificate has expired"),
    "a client's": (put_pair("client"), "tls.crt is of no use: unsuitable certificate purpose"),
    "no certificate": (put_text("tls.crt", b"certificate\n"), "tls.crt is of no use for TLS"),
    "no key": (put_text("tls.key", b""), "of no use for TLS"),
    "no authority": (put_text("ca.crt", b"nonsense"), "ca.crt is of no use for TLS"),
    "missing key": (lambda folder, _: (folder / "tls.key").unlink(), "key file .* cannot be read: No such file"),
    "key for all": (lambda folder, _: (folder / "tls.key").chmod(0o644), "open to every user"),
    "tokens for all": (lambda folder, _: (folder / "tokens").chmod(0o604), "open to every user"),
    "missing tokens": (lambda folder, _: (folder / "tokens").unlink(), "token file .* cannot be read"),
    "bad tokens": (put_text("tokens", b"use alice\n"), "tokens, line 1: wants a role"),
    "no text": (put_text("tokens", b"\xff\xfe\n"), "is no text"),
    "endless": (put_text("tokens", b"#" * (2 << 20)), "more than 1048576 bytes"),
    "a folder": (put_folder, "token file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_name_and_reason(folder: Path, made: Path, case: str) -> None:
    """Each is found before it is used, and the error quotes nothing of what stands there."""
    change, words = BAD[case]
    load_credentials(settings(folder))
    change(folder, made)
    with pytest.raises(SettingsError, match=words) as caught:
        load_credentials(settings(folder))
    assert str(folder) in caught.value.message
    assert "SECRET" not in caught.value.message
    assert "BEGIN" not in caught.value.message


def test_encrypted_key_is_refused_without_asking(folder: Path) -> None:
    """A key with a password ends in an error; no terminal is asked."""
    encrypt = ["openssl", "pkey", "-in", "tls.key", "-aes256", "-passout", "pass:word", "-out", "encrypted"]
    subprocess.run(encrypt, cwd=folder, check=True, timeout=60)
    (folder / "encrypted").replace(folder / "tls.key")
    with pytest.raises(SettingsError, match="of no use for TLS"):
        load_credentials(settings(folder))


def test_files_replaced_meanwhile_are_not_used(folder: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried is what is used: a pair replaced between reading and trying is an error."""
    tried = module._try

    def replacing(certificate: Path, key: Path) -> None:
        put_pair("other")(folder, made)
        tried(certificate, key)

    monkeypatch.setattr(module, "_try", replacing)
    with pytest.raises(SettingsError, match="replaced while it was read"):
        load_credentials(settings(folder))


TLS = {"tls_certificate": Path("c"), "tls_key": Path("k")}
CA = {"tls_client_ca": Path("a")}
TOKEN = {"token_file": Path("t")}


@pytest.mark.parametrize(
    ("address", "server", "words"),
    [
        ("unix:/run/x", {}, ""),
        ("127.0.0.1:1", {}, ""),
        ("[::1]:1", TLS, ""),
        ("0.0.0.0:1", {**TLS, **CA}, ""),
        ("0.0.0.0:1", {**TLS, **TOKEN}, ""),
        ("[::]:1", {**TLS, **CA, **TOKEN}, ""),
        ("0.0.0.0:1", {}, "TLS .* and authentication"),
        ("[::]:1", {}, "open to the network"),
        ("192.0.2.1:1", {}, "open to the network"),
        ("example.test:1", {}, "open to the network"),
        ("0.0.0.0:1", TOKEN, "wants TLS"),
        ("0.0.0.0:1", TLS, "wants authentication"),
        ("unix:/run/x", {"tls_key": Path("k")}, "go together"),
        ("unix:/run/x", {"tls_certificate": Path("c")}, "go together"),
        ("unix:/run/x", CA, "wants server.tls_certificate"),
        ("unix:/run/x", {**TLS, "tls_admins": ("a",)}, "tls_admins"),
        ("unix:/run/x", {**TLS, **CA, **TOKEN, "tls_admins": ("a",)}, "tls_admins"),
        ("unix:/run/x", {"socket_role": "none"}, "wants server.token_file"),
        ("unix:/run/x", {"socket_role": "none", **TOKEN}, ""),
    ],
)
def test_what_may_listen(address: str, server: dict[str, Any], words: str) -> None:
    """An address of the network wants TLS and authentication, both; half of a pair of settings is an error."""
    addresses = [parse_address("unix:/run/first"), parse_address(address)]
    if not words:
        check_exposure(addresses, ServerSettings(**server))
        return
    with pytest.raises(SettingsError, match=words):
        check_exposure(addresses, ServerSettings(**server))


def test_the_trial_is_a_real_handshake(made: Path) -> None:
    """It is the handshake that finds an expired certificate: loading it, as the control shows, does not."""
    with pytest.raises(SettingsError, match="expired"):
        module._try(made / "expired.pem", made / "expired.key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made / "expired.pem", made / "expired.key")
