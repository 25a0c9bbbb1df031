"""Bucket sizes: which sizes are captured, and which of them a given size is raised to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence


class Ladder:
    """Sizes in rising order, each once."""

    __slots__ = ("sizes",)

    def __init__(self, sizes: Iterable[int]) -> None:
        """Raises ValueError when there is no size, or one below 1."""
        self.sizes: tuple[int, ...] = tuple(sorted(set(sizes)))
        if not self.sizes:
            raise ValueError("a ladder needs at least one size")
        if self.sizes[0] < 1:
            raise ValueError(f"sizes start at 1, not {self.sizes[0]}")

    @classmethod
    def powers(cls, limit: int) -> Ladder:
        """1, 2, 4, ... below `limit`, and `limit` itself."""
        return cls([*(1 << exponent for exponent in range(max(limit, 1).bit_length()) if 1 << exponent < limit), limit])

    @classmethod
    def stepped(cls, steps: Sequence[tuple[int, int]]) -> Ladder:
        """From pairs (until, step): ((8, 1), (16, 2)) is 1 to 8, 10, 12, 14, 16. Raises ValueError when they do not rise."""
        sizes: list[int] = []
        size = 0
        for until, step in steps:
            if step < 1 or until <= size:
                raise ValueError(f"a ladder rises: ({until}, {step}) after {size}")
            sizes.extend(range(size + step, until, step))
            sizes.append(until)
            size = until
        return cls(sizes)

    def bucket(self, size: int) -> int | None:
        """The smallest bucket that holds `size`; None when none does."""
        index = bisect_left(self.sizes, size)
        return self.sizes[index] if index < len(self.sizes) else None

    def __iter__(self) -> Iterator[int]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ladder) and self.sizes == other.sizes

    def __hash__(self) -> int:
        return hash(self.sizes)

    def __repr__(self) -> str:
        return f"Ladder({list(self.sizes)})"
