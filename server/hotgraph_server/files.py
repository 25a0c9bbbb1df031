"""Files that are written whole or not at all. It knows nothing of what is in them."""

from __future__ import annotations

import os
import time
from pathlib import Path


def write_whole(path: Path, text: str, *, mode: int | None = None) -> None:
    """The file is the old one or the new one, whole, whenever the process or the machine ends. Raises OSError.

    mode: of the file; None leaves it to the process's mask. The text is UTF-8.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
