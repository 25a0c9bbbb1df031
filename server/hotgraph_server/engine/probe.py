"""The probe step of a shape: rows of one made-up sequence in the probe slot. By it a graph is compared with the eager run."""

from __future__ import annotations

from hotgraph_server.batch import Batch, Row, Sampler, SlotAssignment, StepKey
from hotgraph_server.request import SamplingParams

PREFIX_TOKENS = 48
"""Positions before the first row's, whose keys and values nothing writes: rows look back at them."""


class ProbeLayout:
    """Lays rows out over the positions from a short prefix to `num_positions` - 1.

    A position always has the same token, whichever row is there, so that rows that overlap write the same keys and values.
    """

    def __init__(self, *, num_positions: int, vocabulary_size: int) -> None:
        if num_positions < 2:
            raise ValueError(f"{num_positions} positions are too few for a probe")
        self._prefix = min(PREFIX_TOKENS, num_positions // 4)
        self._end = num_positions
        self._vocabulary_size = vocabulary_size

    def batch(self, key: StepKey, slot: int) -> Batch:
        """A step that fills the key's shape, or as much of it as there are positions; the rest is padding.

        No two rows share a position: kernels may differ in how they round, and either might write it last.
        """
        prefix = min(self._prefix, max(0, self._end - key.tokens))
        num_tokens = min(key.tokens, self._end - prefix)
        num_rows = min(key.rows, num_tokens)
        longest = -(-num_tokens // num_rows)
        num_long = num_tokens - num_rows * (longest - 1)
        rows = []
        start = prefix
        for index in range(num_rows):
            length = longest if index < num_long else longest - 1
            rows.append(Row(slot, start, length, self._ids(start, length), True))
            start += length
        sampling = SamplingParams(temperature=0.0 if key.sampler is Sampler.GREEDY else 0.8)
        if key.sampler is Sampler.FILTERED:
            sampling = SamplingParams(temperature=0.8, top_k=50, repetition_penalty=1.1)
        return Batch(
            step=0,
            rows=rows,
            assignments=[SlotAssignment(slot, sampling, 104729, self._ids(0, self._end), ())],
            sampler=key.sampler,
            num_logprobs=0 if key.sampler is Sampler.FILTERED else None,
        )

    def _ids(self, start: int, length: int) -> list[int]:
        return [(7919 * position + 104729) % self._vocabulary_size for position in range(start, start + length)]
