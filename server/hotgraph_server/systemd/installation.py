"""The unit files that come with the package: where each goes, what would change there, writing and removing them.

It changes files and nothing else: users, folders and services are made by systemd's own commands, which are named afterwards.
"""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath

from hotgraph_server.files import write_whole

UNITS = ("hotgraph.service", "hotgraph@.service")
DROP_INS = ("credentials", "lan", "systemd-254", "unix-only")
SHIPPED_PREFIX = "/opt/hotgraph"
DROP_IN_ORDER = 50  # of 99: what an operator adds later has the last word
FILE_MODE = 0o644


class Action(enum.Enum):
    """What becomes of one file."""

    CREATE = "create"
    REPLACE = "replace"  # it is ours and says something else
    KEEP = "keep"  # it says what it should, or it is the operator's by now
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Change:
    """One file, as it is and as it would be. `before` is None when it is not there, `after` when it would not be."""

    path: Path
    action: Action
    before: str | None
    after: str | None

    @property
    def diff(self) -> str:
        """What would change, as a unified diff; empty for nothing."""
        lines = difflib.unified_diff(
            (self.before or "").splitlines(keepends=True),
            (self.after or "").splitlines(keepends=True),
            "/dev/null" if self.before is None else str(self.path),
            "/dev/null" if self.after is None else str(self.path),
        )
        return "".join(lines) if self.action is not Action.KEEP else ""


@dataclass(frozen=True, slots=True)
class _File:
    path: PurePosixPath
    text: str
    is_operators: bool = False  # settings: written once, never over what is there


def shipped(name: str) -> str:
    """The text of a file that comes with the package."""
    return files("hotgraph_server.systemd").joinpath("files", name).read_text(encoding="utf-8")


def plan_install(*, prefix: Path, destdir: Path, drop_ins: Iterable[str] = ()) -> list[Change]:
    """What installing would do: the units, for the hotgraph below `prefix`, with these of DROP_INS.

    Paths are below `destdir`, "/" for this machine. Drop-ins that are there and not asked for stay. Raises OSError, and
    ValueError for a file that is no text.
    """
    changes = []
    for file in _files(prefix, drop_ins):
        path = _below(destdir, file.path)
        before = _read(path)
        if before is None:
            action = Action.CREATE
        else:
            action = Action.KEEP if before == file.text or file.is_operators else Action.REPLACE
        changes.append(Change(path, action, before, before if action is Action.KEEP else file.text))
    return changes


def plan_uninstall(*, destdir: Path) -> list[Change]:
    """What uninstalling would do: files that are as some install wrote them go, those that somebody changed stay.

    Raises OSError, and ValueError for a file that is no text.
    """
    changes = []
    for file in _files(Path(SHIPPED_PREFIX), DROP_INS):
        path = _below(destdir, file.path)
        before = _read(path)
        if before is None:
            continue
        is_ours = _without_prefix(before) == _without_prefix(file.text)
        changes.append(Change(path, Action.REMOVE if is_ours else Action.KEEP, before, None if is_ours else before))
    return changes


def apply(changes: Iterable[Change]) -> None:
    """Does it. A file is replaced whole or not at all; folders that are empty afterwards go. Raises OSError."""
    for change in changes:
        if change.action is Action.REMOVE:
            change.path.unlink()
            if change.path.parent.name in {f"{unit}.d" for unit in UNITS} | {"hotgraph"}:
                _remove_if_empty(change.path.parent)
        elif change.action in (Action.CREATE, Action.REPLACE) and change.after is not None:
            _write(change.path, change.after)


def _files(prefix: Path, drop_ins: Iterable[str]) -> Iterator[_File]:
    """Everything an install writes. Raises ValueError for a drop-in that there is not."""
    system = PurePosixPath("/etc/systemd/system")
    for unit in UNITS:
        yield _File(system / unit, _for_prefix(shipped(unit), prefix))
    for name in drop_ins:
        if name not in DROP_INS:
            raise ValueError(f"no drop-in is called {name!r}; there are {', '.join(DROP_INS)}")
        for unit in UNITS:
            yield _File(
                system / f"{unit}.d" / f"{DROP_IN_ORDER}-{name}.conf", _for_prefix(shipped(f"{name}.conf"), prefix)
            )
    yield _File(PurePosixPath("/etc/sysusers.d/hotgraph.conf"), shipped("hotgraph.sysusers.conf"))
    yield _File(PurePosixPath("/etc/tmpfiles.d/hotgraph.conf"), shipped("hotgraph.tmpfiles.conf"))
    for name in ("hotgraph.toml", "hotgraph.env"):
        text = _for_prefix(shipped(name), prefix)
        yield _File(PurePosixPath("/etc/hotgraph") / name, text, is_operators=True)


def _for_prefix(text: str, prefix: Path) -> str:
    return text.replace(f"{SHIPPED_PREFIX}/bin/", f"{prefix}/bin/")


def _without_prefix(text: str) -> str:
    """The text with every path to hotgraph's own program taken for the same."""
    return re.sub(r"[^ =\n]*/bin/hotgraph(?= )", "hotgraph", text)


def _below(destdir: Path, path: PurePosixPath) -> Path:
    return destdir / path.relative_to("/")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text, mode=FILE_MODE)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
