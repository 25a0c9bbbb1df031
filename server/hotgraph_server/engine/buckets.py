"""Which graph shapes there are, and which of them can hold a step. It knows sizes only, no cache and no tensors.

A key whose tokens equal its rows is for decode alone: every row has one token. A step with a longer row always gets a key
with more tokens than rows, so that a decode graph never has to know of query lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphcache import Ladder
from hotgraph_server.batch import Sampler, StepKey

DECODE_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
# What a step takes grows in stairs, those of cuBLAS. On an H200, for a 7B Llama, 384, 400, 416, 448, 480 and 512 tokens took
# 7.94, 8.75, 9.48, 9.81, 9.82 and 10.35 ms: a size stands where a stair ends.
TOKEN_SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 400, 480, 512)
ROW_SIZES = (1, 2, 4, 8, 16, 32, 64)

SAMPLERS = (Sampler.GREEDY, Sampler.GUMBEL, Sampler.FILTERED)
"""In the order of what they can do: each can do what the ones before it can."""


def _grown(sizes: Sequence[int], limit: int, *, steps_per_doubling: int) -> list[int]:
    """`sizes` up to `limit`, going on in even steps within each doubling, and `limit` itself as the last."""
    result = [size for size in sizes if size < limit]
    size = sizes[-1]
    while size < limit:
        step = (1 << (size.bit_length() - 1)) // steps_per_doubling
        size += step
        if size < limit:
            result.append(size)
    return [*result, limit]


class Buckets:
    """The ladders of an engine with `num_slots` slots and `max_step_tokens` tokens a step.

    `max_padding_ratio`: a graph may be used for a step when it has at most this many times the step's tokens.
    """

    def __init__(self, *, num_slots: int, max_step_tokens: int, max_padding_ratio: float) -> None:
        max_rows = min(num_slots, max_step_tokens)
        self._decode = Ladder(_grown(DECODE_SIZES, max_rows, steps_per_doubling=4))
        self._tokens = Ladder(_grown(TOKEN_SIZES, max_step_tokens, steps_per_doubling=4))
        # Of steps with a longer row: those have fewer rows than tokens.
        self._rows = Ladder(_grown(ROW_SIZES, max(1, min(max_rows, max_step_tokens - 1)), steps_per_doubling=1))
        self._max_padding_ratio = max_padding_ratio
        self._larger: dict[StepKey, tuple[StepKey, ...]] = {}
        self._keys: dict[tuple[int, int, str], StepKey] = {}  # made once: that costs more than to look it up
        self._shapes = sorted(
            {(size, size) for size in self._decode.sizes}
            | {(tokens, rows) for tokens in self._tokens.sizes for rows in self._rows.sizes if rows < tokens}
        )

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """All (tokens, rows) there are, smallest first."""
        return self._shapes

    def key(self, num_tokens: int, num_rows: int, sampler: Sampler) -> StepKey | None:
        """The smallest shape that holds such a step; None when none does."""
        if not 1 <= num_rows <= num_tokens:
            return None
        if num_tokens == num_rows:
            size = self._decode.bucket(num_rows)
            return None if size is None else self._key(size, size, sampler)
        rows = self._rows.bucket(num_rows)
        if rows is None:
            return None
        tokens = self._tokens.bucket(max(num_tokens, rows + 1))
        return None if tokens is None else self._key(tokens, rows, sampler)

    def _key(self, tokens: int, rows: int, sampler: Sampler) -> StepKey:
        found = self._keys.get((tokens, rows, sampler.value))
        if found is None:
            found = self._keys[tokens, rows, sampler.value] = StepKey(tokens, rows, sampler)
        return found

    def larger(self, key: StepKey) -> tuple[StepKey, ...]:
        """Other keys whose graphs can run what `key` is for, nearest first, within the padding ratio of `key.tokens`."""
        found = self._larger.get(key)
        if found is None:
            samplers = SAMPLERS[SAMPLERS.index(key.sampler) :]
            limit = key.tokens * self._max_padding_ratio
            is_decode = key.tokens == key.rows
            found = tuple(
                StepKey(tokens, rows, sampler)
                for tokens, rows in self._shapes
                if key.tokens <= tokens <= limit and rows >= key.rows and (is_decode or tokens > rows)
                for sampler in samplers
                if (tokens, rows, sampler) != (key.tokens, key.rows, key.sampler)
            )
            self._larger[key] = found
        return found
