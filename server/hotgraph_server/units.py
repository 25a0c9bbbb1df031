"""Bytes and seconds as people write and read them. Knows no setting and imports nothing of ours: clients use it, too."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_BYTE_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_SECOND_UNITS: dict[str, Fraction] = {
    "": Fraction(1),
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 10**3),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}
# ASCII digits only, and few of them: what does not match is an error, never a surprise.
_QUANTITY = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)


def _parse(text: str, units: dict[str, int] | dict[str, Fraction], example: str) -> Fraction:
    match = _QUANTITY.fullmatch(text)
    scale = None if match is None else units.get(match[2].lower())
    if match is None or scale is None:
        raise ValueError(f"not {example}: {text!r}")
    return Fraction(match[1]) * scale


def parse_bytes(text: str) -> int:
    """Bytes of a text such as "4096", "64KiB", "1.5 GiB" or "2GB"; KiB counts by 1024 and kB by 1000, in any case.

    Raises ValueError when it is no size or no whole number of bytes.
    """
    value = _parse(text, _BYTE_UNITS, "a size in bytes, such as 4096, 512MiB or 2GiB")
    if value.denominator != 1:
        raise ValueError(f"not a whole number of bytes: {text!r}")
    return value.numerator


def parse_seconds(text: str) -> float:
    """Seconds of a text such as "2", "0.5s", "150ms", "10min" or "1h". Raises ValueError when it is none."""
    return float(_parse(text, _SECOND_UNITS, "a time, such as 2, 150ms, 1.5s, 10min or 1h"))


def exact_bytes(num_bytes: int) -> str:
    """`num_bytes` in the largest unit that divides it, such as "64KiB"; `parse_bytes` gives it back."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _BYTE_UNITS[unit.lower()]
        if num_bytes and num_bytes % scale == 0:
            return f"{num_bytes // scale}{unit}"
    return str(num_bytes)


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` for people, three digits or so: "0 B", "1.50 GiB"."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.{_decimals(value)}f} {unit}"


def format_seconds(seconds: float | None) -> str:
    """`seconds` for people, three digits or so: "850 µs", "12.3 ms", "4.20 s", "2 h 05 min"; None reads "-"."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    magnitude = abs(seconds)
    if magnitude == 0:
        return "0 s"
    if magnitude < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if magnitude < 1:
        return f"{seconds * 1e3:.{_decimals(seconds * 1e3)}f} ms"
    if magnitude < 120:
        return f"{seconds:.{_decimals(seconds)}f} s"
    minutes, rest = divmod(round(magnitude), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    sign = "-" if seconds < 0 else ""
    if days:
        return f"{sign}{days} d {hours:02d} h"
    return f"{sign}{hours} h {minutes:02d} min" if hours else f"{sign}{minutes} min {rest:02d} s"


def _decimals(value: float) -> int:
    """Decimals that leave about three digits."""
    magnitude = abs(value)
    return 2 if magnitude < 10 else 1 if magnitude < 100 else 0
