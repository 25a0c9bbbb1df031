"""The host's side of the ring of stages: writes steps down for `kernels.prepare`, with as few calls as there are parts.

Written is only what a step needs. On a GPU the ring is pinned memory that the device reads, so there is nothing to upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack_into
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hotgraph_server.kernels.prepare_stage import StageLayout

_WORD_BYTES = 4


class Stages:
    """`depth` stages, of which the one at the number of a step modulo `depth` is that step's.

    A stage must not be written before the step that read it last is over: `depth` says how many may be under way.
    """

    def __init__(self, layout: StageLayout, depth: int, device: torch.device) -> None:
        self.layout = layout
        self.tensor = torch.zeros((depth, layout.num_words), dtype=torch.int32, pin_memory=device.type != "cpu")
        self._words = [words.data for words in self.tensor.numpy()]
        self._parameters: list[npt.NDArray[Any]] = list(layout.parameters(self.tensor).numpy())
        self._tables: list[npt.NDArray[Any]] = list(layout.tables(self.tensor).numpy())

    def write_records(self, number: int, words: Sequence[int]) -> None:
        """The records of a step's rows, one after the other."""
        pack_into(f"{len(words)}i", self._words[number % len(self._words)], 0, *words)

    def write_ids(self, number: int, token_ids: Sequence[int]) -> None:
        """A step's tokens, from the first on."""
        place = self._words[number % len(self._words)]
        pack_into(f"{len(token_ids)}i", place, self.layout.ids_at * _WORD_BYTES, *token_ids)

    def write_blocks(self, number: int, row: int, first: int, blocks: npt.NDArray[np.int32]) -> None:
        """Blocks of the row's slot, from index `first` of its table on."""
        self._tables[number % len(self._words)][row, first : first + len(blocks)] = blocks

    def write_parameters(self, number: int, row: int, words: npt.NDArray[np.int32]) -> None:
        """The parameters of the row's slot."""
        self._parameters[number % len(self._words)][row] = words
