"""How commands print: tables and notes for people, JSON for programs, text made safe for terminals. It knows no command.

JSON goes to standard output: one document for a result, one line an event for a stream. Keys are the field names of the
Python client's types; durations are numbers of seconds, times are ISO 8601 in UTC, enum values are their lower-case names.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

PLAIN_WIDTH = 160  # columns of a table that goes to a file or a pipe


def console(*, stderr: bool = False) -> Console:
    """A rich console on standard output or error as they are now; wide enough for tables when it is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def table(columns: Iterable[str], *, numbers: Iterable[str] = ()) -> Table:
    """An empty rich table; columns named in `numbers` are right-aligned."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    right = set(numbers)
    for column in columns:
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return result


def titled(title: str, rows: Table, *remarks: str) -> RenderableType:
    """A table under a heading and over remarks, neither of which is broken to the table's width."""
    from rich.console import Group
    from rich.text import Text

    below = [Text(remark, style="dim") for remark in remarks if remark]
    return Group(Text(safe(title), style="bold"), rows, *below, "")


def note(text: str) -> None:
    """A line for people on standard error, where it does not mix with the result."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def write(text: str) -> None:
    """`text` on standard output at once, made safe when that is a terminal."""
    sys.stdout.write(safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def safe(text: str) -> str:
    """`text` without characters that steer a terminal: control characters but line break and tab become U+FFFD."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs") else "\ufffd"
        for character in text
    )


def jsonable(value: Any) -> Any:
    """`value` as JSON types: dataclasses as objects of their fields, bytes as text with backslash escapes for what is none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, datetime):
        return timestamp(value)
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def print_json(value: Any) -> None:
    """One result: indented on a terminal, else on one line."""
    indent = 2 if sys.stdout.isatty() else None
    sys.stdout.write(json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_json_line(value: Any) -> None:
    """One event of a stream, on a line of its own, at once."""
    sys.stdout.write(json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def timestamp(moment: datetime) -> str:
    """ISO 8601 in UTC with milliseconds, such as 2025-01-31T12:00:00.123Z."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clock_time(moment: datetime | None) -> str:
    """Local time of day for people; with the date when that is another day; "-" for None."""
    if moment is None:
        return "-"
    local = moment.astimezone()
    is_today = local.date() == datetime.now(UTC).astimezone().date()
    return local.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M:%S")


def age_seconds(moment: datetime | None) -> float | None:
    """Seconds since `moment`, never negative; None for None."""
    return None if moment is None else max(0.0, (datetime.now(UTC) - moment).total_seconds())
