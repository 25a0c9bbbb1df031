"""Tests of files.py: a file is there whole, as it was or as it is meant to be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hotgraph_server.files import write_whole


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    """Nothing else is left in the folder, and whoever has the old one open reads it to its end."""
    path = tmp_path / "table.json"
    write_whole(path, "first, with a ü")
    with path.open(encoding="utf-8") as before:
        write_whole(path, "second")
        assert before.read() == "first, with a ü"
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_the_mode_is_the_one_asked_for_else_the_masks(tmp_path: Path) -> None:
    """Whatever mask the process has, and also over a file of another mode."""
    mask = os.umask(0o077)
    try:
        write_whole(tmp_path / "own", "a")
        write_whole(tmp_path / "own", "b", mode=0o644)
        write_whole(tmp_path / "masked", "c")
    finally:
        os.umask(mask)
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "masked").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_a_failure_leaves_the_old_file_alone(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, say: the error is the caller's, and nothing of the new file stays."""
    path = tmp_path / "table.json"
    write_whole(path, "first")

    def full(descriptor: int, *rest: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "second", mode=0o644)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that stops could keep the name and lose the text."""
    path = tmp_path / "table.json"
    seen: list[str] = []

    def synced(descriptor: int) -> None:
        (temporary,) = tmp_path.iterdir()
        assert os.path.samestat(os.fstat(descriptor), temporary.stat())
        seen.append(temporary.read_text())

    monkeypatch.setattr(os, "fsync", synced)
    write_whole(path, "all of it")
    assert seen == ["all of it"]
    assert path.exists()
