"""The host's side of the ring of stages: writes steps down for `kernels.prepare`.

Written is only what a step needs. On a GPU the ring is pinned memory that the device reads, so there is nothing to upload.
After a pause every function costs tens of times what it costs when it is called often, so there are few, and none of numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, pack_into

import torch

from hotgraph_server.engine.slots import HostSlot
from hotgraph_server.kernels.prepare_stage import IS_NEW, RECORD_WORDS, StageLayout

_WORD_BYTES = 4
_RECORD = Struct(f"{RECORD_WORDS}i")


class Stages:
    """`depth` stages, of which the one at the number of a step modulo `depth` is that step's.

    A stage must not be written before the step that read it last is over: `depth` says how many may be under way.
    """

    def __init__(self, layout: StageLayout, depth: int, device: torch.device) -> None:
        self.layout = layout
        self.tensor = torch.zeros((depth, layout.num_words), dtype=torch.int32, pin_memory=device.type != "cpu")
        self._bytes = [words.data.cast("B") for words in self.tensor.numpy()]
        self._ids_at = layout.ids_at * _WORD_BYTES
        self._parameters_at = layout.parameters_at * _WORD_BYTES
        self._parameters_stride = layout.parameters_stride * _WORD_BYTES
        self._tables_at = layout.tables_at * _WORD_BYTES
        self._table_stride = layout.max_blocks * _WORD_BYTES

    def write_row(
        self,
        number: int,
        row: int,
        slot: int,
        start: int,
        offset: int,
        end: int,
        flags: int,
        source: int = 0,
        first_block: int = 0,
        end_block: int = 0,
    ) -> None:
        """The row's record: see `RowRecord`."""
        place = self._bytes[number % len(self._bytes)]
        at = row * _RECORD.size
        _RECORD.pack_into(place, at, slot, start, offset, end, flags, source, first_block, end_block)

    def write_ids(self, number: int, token_ids: Sequence[int]) -> None:
        """A step's tokens, from the first on."""
        place = self._bytes[number % len(self._bytes)]
        pack_into(f"{len(token_ids)}i", place, self._ids_at, *token_ids)

    def write_slot(self, number: int, row: int, held: HostSlot) -> tuple[int, int, int, int]:
        """What is new of the slot of this row, which is noted there as told.

        Returns what the records of all rows in the slot must say of it: a flag, and the last three words.
        """
        place = self._bytes[number % len(self._bytes)]
        first, end = held.num_told, len(held.blocks)
        if first < end:
            at = self._tables_at + row * self._table_stride + first * _WORD_BYTES
            pack_into(f"{end - first}i", place, at, *held.blocks[first:])
        flag = 0
        if held.is_new:
            at = self._parameters_at + row * self._parameters_stride
            place[at : at + len(held.parameters)] = held.parameters
            flag = IS_NEW
        held.is_new, held.num_told = False, end
        return flag, row, first, end
