"""A stage: one step as the host writes it down for `prepare_step`, in int32 words that the device reads where they lie.

It knows where each word stands and what it says, not who writes it. Stages form a ring, and a step's is chosen by the number
of steps before it, so that a step needs no copy and no argument: on a GPU the ring is pinned memory of the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hotgraph_server.kernels.jit import next_power_of_two

RECORD_WORDS = 8
"""A row's, `RowRecord`: 32 bytes, which a GPU reads over the bus at once."""

IS_SAMPLED = 1
"""Flag of a row: its logits choose a token."""

IS_LAST = 2
"""Flag of a row of one token: the token is the one that its slot sampled last. What stands in `token_ids` is not looked at."""

IS_NEW = 4
"""Flag of a row: its slot was assigned. Its parameters stand in the stage, and its table holds the stage's blocks alone."""

_LINE_WORDS = 32  # parts begin at multiples of 128 bytes


class RowRecord(NamedTuple):
    """What a stage says of a row. Of its slot: what changed since the row's slot was last used, and nothing if `end_block`
    is `first_block` and it is not new.

    Tokens offset .. end - 1 of the step, at positions from `start` on; padding rows have none, and start at 0. Blocks
    first_block .. end_block - 1 of the slot's table stand in the stage's table of row `source`, each at its own index, and
    so do the parameters. Rows of one slot say the same of it.
    """

    slot: int
    start: int
    offset: int
    end: int
    flags: int
    source: int = 0
    first_block: int = 0
    end_block: int = 0


@dataclass(frozen=True, slots=True)
class StageLayout:
    """Of a stage for steps of at most so many rows, tokens, blocks of a table, and words of a slot's parameters.

    `*_at`: where a part begins, in words. Records: [max_rows, RECORD_WORDS]; token ids: [max_tokens]; parameters:
    [max_rows, parameters_stride], of which `num_parameters` are used; tables: [max_rows, max_blocks].
    """

    max_rows: int
    max_tokens: int
    max_blocks: int
    num_parameters: int

    @property
    def ids_at(self) -> int:
        return _whole_lines(self.max_rows * RECORD_WORDS)

    @property
    def parameters_at(self) -> int:
        return self.ids_at + _whole_lines(self.max_tokens)

    @property
    def parameters_stride(self) -> int:
        return next_power_of_two(self.num_parameters)

    @property
    def tables_at(self) -> int:
        return self.parameters_at + _whole_lines(self.max_rows * self.parameters_stride)

    @property
    def num_words(self) -> int:
        return self.tables_at + _whole_lines(self.max_rows * self.max_blocks)

    def records(self, stages: torch.Tensor) -> torch.Tensor:
        """The records in stages (int32 [..., num_words]): a view, [..., max_rows, RECORD_WORDS]."""
        return self._part(stages, 0, RECORD_WORDS)

    def token_ids(self, stages: torch.Tensor) -> torch.Tensor:
        """A view, [..., max_tokens]."""
        return stages[..., self.ids_at : self.ids_at + self.max_tokens]

    def parameters(self, stages: torch.Tensor) -> torch.Tensor:
        """A view, [..., max_rows, num_parameters]."""
        return self._part(stages, self.parameters_at, self.parameters_stride)[..., : self.num_parameters]

    def tables(self, stages: torch.Tensor) -> torch.Tensor:
        """A view, [..., max_rows, max_blocks]."""
        return self._part(stages, self.tables_at, self.max_blocks)

    def _part(self, stages: torch.Tensor, at: int, row_words: int) -> torch.Tensor:
        words = stages[..., at : at + self.max_rows * row_words]
        return words.view(*stages.shape[:-1], self.max_rows, row_words)


def _whole_lines(num_words: int) -> int:
    return -(-num_words // _LINE_WORDS) * _LINE_WORDS
