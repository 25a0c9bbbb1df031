"""The crash record: a file in memory that says which requests run now, so that the next life of the daemon knows who ran when
this one died.

A request is a digest there, never its text. Writing is a store into a shared mapping, whose pages are the kernel's: they
outlive the process however it dies, and no call of the system is in the way of a step. Only a crash of the host loses them, and
for that no request is to blame. What follows from a crash is `quarantine.py`'s matter.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAGIC: Final = b"hotgraph crashes 1\n".ljust(32, b"\0")
DIGEST_BYTES: Final = 16
MAX_RUNNING: Final = 1024  # requests; not more than slots there are
MAX_SUSPECTS: Final = 1024

_RUNNING: Final = struct.Struct(f"<{DIGEST_BYTES}sB15x")  # digest, 0: free, 1: runs, 2: on trial
_SUSPECT: Final = struct.Struct(
    f"<{DIGEST_BYTES}s16sdB7x"
)  # digest, incident, since, num_crashes or CONVICTED; 0: free
_RUNNING_OFFSET: Final = len(MAGIC)
_SUSPECT_OFFSET: Final = _RUNNING_OFFSET + MAX_RUNNING * _RUNNING.size
FILE_BYTES: Final = _SUSPECT_OFFSET + MAX_SUSPECTS * _SUSPECT.size
CONVICTED: Final = 255


@dataclass(frozen=True, slots=True)
class Suspect:
    """A request that ran when the daemon died. `since`: of the last such death, on the monotonic clock of the host, in seconds.

    `incident`: what its callers are told once it is convicted, 32 hexadecimal digits; else empty.
    """

    num_crashes: int
    since: float
    incident: str = ""

    @property
    def is_convicted(self) -> bool:
        return bool(self.incident)


class CrashRecord:
    """The open file. It belongs to one process at a time, and one thread of it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the file cannot be had whole, as on a full disk or while another process has it, and ValueError
        for a file that is none of ours, which is left as it is."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size_bytes = os.fstat(self._file).st_size
            if size_bytes not in (0, FILE_BYTES):
                raise ValueError("is no crash record")
            # All of it on the disk from the start: a store into a page that finds no room is SIGBUS.
            os.posix_fallocate(self._file, 0, FILE_BYTES)
            self._map = mmap.mmap(self._file, FILE_BYTES)
            magic = self._map[: len(MAGIC)]
            if magic.strip(b"\0") and magic != MAGIC:
                self._map.close()
                raise ValueError("is no crash record")
            self._map[: len(MAGIC)] = MAGIC
        except BaseException:
            os.close(self._file)
            raise
        self._free = list(range(MAX_RUNNING))

    def running(self) -> dict[bytes, bool]:
        """What ran when the last life ended, and whether it was on trial. Nothing after a life that ended well."""
        found: dict[bytes, bool] = {}
        for place in range(MAX_RUNNING):
            digest, state = _RUNNING.unpack_from(self._map, _RUNNING_OFFSET + place * _RUNNING.size)
            if state:
                found[digest] = found.get(digest, False) or state == 2
        return found

    def forget_running(self) -> None:
        self._map[_RUNNING_OFFSET:_SUSPECT_OFFSET] = bytes(_SUSPECT_OFFSET - _RUNNING_OFFSET)
        self._free = list(range(MAX_RUNNING))

    def begin(self, digest: bytes, *, is_on_trial: bool) -> int | None:
        """Notes that a request runs; returns its place, None when there is none left."""
        if not self._free:
            return None
        place = self._free.pop()
        self._put(place, digest, 2 if is_on_trial else 1)
        return place

    def acquit(self, place: int, digest: bytes) -> None:
        """It runs on, and is no longer on trial."""
        self._put(place, digest, 1)

    def end(self, place: int) -> None:
        """It runs no more."""
        self._put(place, bytes(DIGEST_BYTES), 0)
        self._free.append(place)

    def _put(self, place: int, digest: bytes, state: int) -> None:
        _RUNNING.pack_into(self._map, _RUNNING_OFFSET + place * _RUNNING.size, digest, state)

    def suspects(self) -> dict[bytes, Suspect]:
        found = {}
        for index in range(MAX_SUSPECTS):
            digest, incident, since, state = _SUSPECT.unpack_from(self._map, _SUSPECT_OFFSET + index * _SUSPECT.size)
            if state == CONVICTED:
                found[digest] = Suspect(2, since, incident.hex())
            elif state:
                found[digest] = Suspect(state, since)
        return found

    def set_suspects(self, suspects: Mapping[bytes, Suspect]) -> None:
        """These and no others: the first of them, as far as there is room."""
        table = bytearray(MAX_SUSPECTS * _SUSPECT.size)
        for index, (digest, suspect) in enumerate(list(suspects.items())[:MAX_SUSPECTS]):
            state = CONVICTED if suspect.is_convicted else suspect.num_crashes
            incident = bytes.fromhex(suspect.incident)
            _SUSPECT.pack_into(table, index * _SUSPECT.size, digest, incident, suspect.since, state)
        self._map[_SUSPECT_OFFSET:] = bytes(table)

    def close(self) -> None:
        self._map.close()
        os.close(self._file)  # and with it the lock
