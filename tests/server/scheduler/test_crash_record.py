"""The crash record: what one life writes, the next one reads, however the first ended."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hotgraph_server.scheduler.crash_record import FILE_BYTES, MAX_RUNNING, MAX_SUSPECTS, CrashRecord, Suspect

A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "crashes"


def test_what_runs_is_there_in_the_next_life(path: Path) -> None:
    """Who began and has not ended is found, with whether it was on trial; who ended is not."""
    first = CrashRecord(path)
    assert first.running() == {}
    first.begin(A, is_on_trial=False)
    trial = first.begin(B, is_on_trial=True)
    ended = first.begin(C, is_on_trial=False)
    assert trial is not None
    assert ended is not None
    first.end(ended)
    assert CrashRecord.running(first) == {A: False, B: True}
    first.acquit(trial, B)
    first.close()
    second = CrashRecord(path)
    assert second.running() == {A: False, B: False}
    second.forget_running()
    assert second.running() == {}
    second.close()


def test_suspects_are_kept(path: Path) -> None:
    """All that is known of them is the same after the file was closed; a table that is set anew holds no old ones."""
    suspects = {A: Suspect(1, 12.5), B: Suspect(2, 13.5), C: Suspect(2, 14.5, "ab" * 16)}
    first = CrashRecord(path)
    first.set_suspects(suspects)
    first.close()
    second = CrashRecord(path)
    assert second.suspects() == suspects
    second.set_suspects({A: suspects[A]})
    assert second.suspects() == {A: suspects[A]}
    second.close()


def test_bounds(path: Path) -> None:
    """More than there is room for is left out, and a place that was given back is used again."""
    record = CrashRecord(path)
    places = [record.begin(A, is_on_trial=False) for _ in range(MAX_RUNNING)]
    assert len(set(places)) == MAX_RUNNING
    assert record.begin(B, is_on_trial=False) is None
    assert places[7] is not None
    record.end(places[7])
    assert record.begin(B, is_on_trial=False) == places[7]
    record.set_suspects({n.to_bytes(16, "little"): Suspect(1, 1.0) for n in range(1, MAX_SUSPECTS + 10)})
    assert len(record.suspects()) == MAX_SUSPECTS
    record.close()
    assert path.stat().st_size == FILE_BYTES


def test_the_file_is_its_owners(path: Path) -> None:
    """Nobody else may read who asked the same thing."""
    CrashRecord(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_one_process_at_a_time(path: Path) -> None:
    """A second daemon on the same file gets none, and the first one's stays as it is."""
    first = CrashRecord(path)
    first.begin(A, is_on_trial=False)
    with pytest.raises(BlockingIOError):
        CrashRecord(path)
    assert first.running() == {A: False}
    first.close()


@pytest.mark.parametrize("content", [b"precious", b"p" * FILE_BYTES])
def test_a_file_of_another_kind_is_left_alone(path: Path, content: bytes) -> None:
    """What is no crash record is not written to."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no crash record"):
        CrashRecord(path)
    assert path.read_bytes() == content


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    """Nobody leads the daemon to another file."""
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        CrashRecord(path)
    assert not (tmp_path / "elsewhere").exists()


def test_no_files_stay_open(path: Path) -> None:
    """Closing, and failing to open, leave nothing behind."""

    def is_open() -> bool:
        links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
        return str(path) in links

    record = CrashRecord(path)
    assert is_open()
    record.close()
    assert not is_open()
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match="no crash record"):
        CrashRecord(path)
    assert not is_open()
