"""Authorities and certificates for tests, made by OpenSSL's command: NAME.pem and NAME.key (PKCS 8) in a folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def make_authority(folder: Path, name: str) -> None:
    """A CA that signed itself."""
    _make(
        folder, name, "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign", ["-signkey", f"{name}.key"], 2
    )


def make_certificate(
    folder: Path,
    name: str,
    *,
    authority: str = "ca",
    usage: str = "serverAuth",
    names: str = "DNS:localhost,IP:127.0.0.1",
    days: int = 2,
) -> None:
    """One that `authority` of the folder has signed; with no `names` it has a common name only ("hotgraph test NAME")."""
    extensions = f"extendedKeyUsage={usage}" + (f"\nsubjectAltName={names}" if names else "")
    _make(folder, name, extensions, ["-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial"], days)


def _make(folder: Path, name: str, extensions: str, signer: list[str], days: int) -> None:
    def openssl(*arguments: str) -> None:
        environment = {**os.environ, "OPENSSL_CONF": os.devnull}
        subprocess.run(
            ["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60, env=environment
        )

    (folder / f"{name}.ext").write_text(extensions + "\n")
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", f"{name}.key")
    openssl("req", "-new", "-key", f"{name}.key", "-subj", f"/CN=hotgraph test {name}", "-out", f"{name}.csr")
    request = ["-in", f"{name}.csr", "-days", str(days), "-extfile", f"{name}.ext", "-out", f"{name}.pem"]
    openssl("x509", "-req", *request, *signer)
    (folder / f"{name}.key").chmod(0o600)
