"""Sizes and times as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotgraph_server.units import exact_bytes, format_bytes, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1b", 1),
        ("64KiB", 64 << 10),
        ("1.5 GiB", 3 << 29),
        ("2gib", 2 << 30),
        ("2GB", 2 * 10**9),
        (" 1 TiB ", 1 << 40),
        ("0.5kB", 500),
    ],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    """A size reads as its number of bytes, KiB by 1024 and kB by 1000."""
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "2G", "0.3", "1..5", "nan", "١", "9" * 40, "1 2"])
def test_no_bytes(text: str) -> None:
    """What is no whole number of bytes is an error, never a guess."""
    with pytest.raises(ValueError, match="byte"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2", 2.0), ("150ms", 0.15), ("1.5s", 1.5), ("10min", 600.0), ("1h", 3600.0), ("3us", 3e-6)]
)
def test_parse_seconds(text: str, seconds: float) -> None:
    """A time reads as its seconds."""
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1d", "inf", "1m"])
def test_no_seconds(text: str) -> None:
    """What is no time is an error."""
    with pytest.raises(ValueError, match="time"):
        parse_seconds(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_exact_bytes_round_trip(num_bytes: int) -> None:
    """The exact writing of a size reads back the same."""
    assert parse_bytes(exact_bytes(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (10 << 30, "10.0 GiB"), (1 << 50, "1024 TiB")],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    """A size for people has about three digits."""
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (0.0, "0 s"),
        (0.00085, "850 µs"),
        (0.0123, "12.3 ms"),
        (4.2, "4.20 s"),
        (150.0, "2 min 30 s"),
        (7500.0, "2 h 05 min"),
        (200_000.0, "2 d 07 h"),
    ],
)
def test_format_seconds(seconds: float | None, text: str) -> None:
    """A time for people has about three digits, or two units."""
    assert format_seconds(seconds) == text
