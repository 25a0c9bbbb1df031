"""`hotgraph systemd`: it shows first, and writes when told to."""

from __future__ import annotations

from pathlib import Path

from tests.server.cli.conftest import Run


def test_shows_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    """Without --yes, and with --dry-run beside it, the diff is all there is."""
    for arguments in ([], ["--dry-run", "--yes"]):
        ran = run("systemd", "install", "--destdir", str(tmp_path), "--prefix", "/opt/x", *arguments)
        assert ran.status == 0, ran
        assert "+ExecStart=/opt/x/bin/hotgraph serve --config /etc/hotgraph/hotgraph.toml" in ran.stdout
        assert "nothing is done without --yes" in ran.stderr
        assert list(tmp_path.iterdir()) == []


def test_writes_and_removes(run: Run, tmp_path: Path) -> None:
    """With --yes the files are there, the next commands are named, and uninstall takes the files away."""
    place = ["--destdir", str(tmp_path)]
    ran = run("systemd", "install", *place, "--prefix", "/opt/x", "--with", "unix-only", "--yes")
    assert ran.status == 0, ran
    assert "systemctl daemon-reload" in ran.stderr
    assert (tmp_path / "etc/systemd/system/hotgraph.service.d/50-unix-only.conf").is_file()
    document = run("systemd", "install", *place, "--prefix", "/opt/x", "--json").json
    assert {file["action"] for file in document["files"]} == {"keep"}
    assert document["is_written"] is False
    assert run("systemd", "uninstall", *place, "--yes").status == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_refusals(run: Run, tmp_path: Path) -> None:
    """An unknown drop-in and a hotgraph that is not there are wrong usage; a hidden one is warned of."""
    ran = run("systemd", "install", "--destdir", str(tmp_path), "--with", "wan")
    assert (ran.status, "no drop-in is called 'wan'" in ran.stderr) == (2, True)
    ran = run("systemd", "install", "--prefix", str(tmp_path))
    assert (ran.status, f"there is no {tmp_path}/bin/hotgraph" in ran.stderr) == (2, True)
    ran = run("systemd", "install", "--destdir", str(tmp_path), "--prefix", "/home/alice/venv")
    assert "hidden from the service by its sandbox" in ran.stderr
