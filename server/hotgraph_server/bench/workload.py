"""What the requests of a run ask: prompts and lengths, from a seed alone. It sends nothing.

Request i is the same whatever came before it, so a run can be repeated in any order and on any number of clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

WARMUP_STREAM = 1  # warm-up prompts come from another stream than measured ones: no prefix is found in the cache
MEASURED_STREAM = 0
MAX_LENGTH = 1 << 20


@dataclass(frozen=True, slots=True)
class Lengths:
    """A choice of lengths, in tokens: each of `values` alike, in turn; or, for a range, any from low to high."""

    values: tuple[int, ...]
    is_range: bool = False

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`128`, `16,64,256` (in turn) or `10-500` (uniform, both ends included). Raises ValueError."""
        try:
            if "-" in text:
                low, high = (int(part) for part in text.split("-"))
                values = [low, high]
            else:
                values = [int(part) for part in text.split(",")]
        except ValueError:
            raise ValueError(f"no length: {text!r}; write 128, 16,64,256 or 10-500") from None
        if not all(1 <= value <= MAX_LENGTH for value in values):
            raise ValueError(f"lengths are from 1 to {MAX_LENGTH}: {text!r}")
        if (is_range := "-" in text) and values[0] > values[1]:
            raise ValueError(f"a range goes up: {text!r}")
        return cls(tuple(values), is_range)

    def pick(self, index: int, random: np.random.Generator) -> int:
        if self.is_range:
            return int(random.integers(self.values[0], self.values[1], endpoint=True))
        return self.values[index % len(self.values)]

    @property
    def maximum(self) -> int:
        return max(self.values)

    def __str__(self) -> str:
        return ("-" if self.is_range else ",").join(map(str, self.values))


@dataclass(frozen=True, slots=True)
class Work:
    """One request to send: a prompt as text or token ids, and how many tokens to ask for."""

    index: int
    prompt: str | tuple[int, ...]
    max_tokens: int
    seed: int

    @property
    def num_prompt_tokens(self) -> int:
        """0 for text: only the server knows then."""
        return 0 if isinstance(self.prompt, str) else len(self.prompt)


class Workload(Protocol):
    """Request i of a run."""

    def work(self, index: int, stream: int = MEASURED_STREAM) -> Work: ...


@dataclass(frozen=True)
class RandomWorkload:
    """Prompts of random token ids below `vocabulary_size`, without those in `excluded` (end of text and the like)."""

    seed: int
    prompt_lengths: Lengths
    output_lengths: Lengths
    vocabulary_size: int
    excluded: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if len(self.excluded) >= self.vocabulary_size:
            raise ValueError("no token is left to make prompts of")

    def work(self, index: int, stream: int = MEASURED_STREAM) -> Work:
        random = np.random.default_rng((self.seed, stream, index))
        num_prompt_tokens = self.prompt_lengths.pick(index, random)
        max_tokens = self.output_lengths.pick(index, random)
        ids = [int(token_id) for token_id in random.integers(0, self.vocabulary_size, num_prompt_tokens)]
        for place, token_id in enumerate(ids):
            while token_id in self.excluded:
                token_id = int(random.integers(0, self.vocabulary_size))
            ids[place] = token_id
        return Work(index, tuple(ids), max_tokens, int(random.integers(0, 1 << 63)))


@dataclass(frozen=True)
class TextWorkload:
    """Prompts that are lines of a text, in a seeded order, over and over."""

    seed: int
    lines: Sequence[str]
    output_lengths: Lengths

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError("the text has no line that is not blank")

    @classmethod
    def read(cls, path: Path, *, seed: int, output_lengths: Lengths) -> TextWorkload:
        """Takes every line of a UTF-8 file that is not blank. Raises OSError, ValueError."""
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return cls(seed, lines, output_lengths)

    def work(self, index: int, stream: int = MEASURED_STREAM) -> Work:
        turn, place = divmod(index, len(self.lines))
        order = np.random.default_rng((self.seed, stream, turn, len(self.lines))).permutation(len(self.lines))
        random = np.random.default_rng((self.seed, stream, index))
        max_tokens = self.output_lengths.pick(index, random)
        return Work(index, self.lines[order[place]], max_tokens, int(random.integers(0, 1 << 63)))
