"""What the engine holds for each slot: last token, block table, sampling parameters, penalty counts. Tensors indexed by slot.

Two rows more than there are slots: the scratch slot, which padding rows read and write, and the probe slot, which belongs to
the verification of graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from hotgraph_server.batch import BlockAppend, SlotAssignment
from hotgraph_server.config import BOUNDS
from hotgraph_server.engine.mirrored import Mirrored
from hotgraph_server.kernels.sample import RowSampling

MAX_BANNED = BOUNDS.max_stop_token_ids + 64
"""Stop tokens of a request, and the model's own ends of text."""


class SlotTables:
    """All slots. Written by the host at assignments and block appends, by kernels when a row samples."""

    def __init__(self, *, num_slots: int, max_blocks: int, vocabulary_size: int, device: torch.device) -> None:
        size = num_slots + 2
        self.scratch_slot = num_slots
        self.probe_slot = num_slots + 1
        self.vocabulary_size = vocabulary_size
        # The host's to write. `_floats` and `_integers` hold one parameter a row.
        self._tables = Mirrored((size, max_blocks), np.int32, device)
        self._floats = Mirrored((6, size), np.float32, device)
        self._integers = Mirrored((2, size), np.int64, device)
        self._seeds = Mirrored((size, 2), np.int64, device)
        self._bias_ids = Mirrored((size, BOUNDS.max_logit_bias), np.int64, device)
        self._bias_values = Mirrored((size, BOUNDS.max_logit_bias), np.float32, device)
        self._banned_ids = Mirrored((size, MAX_BANNED), np.int64, device)
        self._banned_ids.host.fill(-1)
        self._parameters = (
            self._floats,
            self._integers,
            self._seeds,
            self._bias_ids,
            self._bias_values,
            self._banned_ids,
        )
        # The kernels' to read.
        self.block_tables = self._tables.tensor
        self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency = self._floats.tensor
        self.top_k, self.banned_until = self._integers.tensor
        self.seeds = self._seeds.tensor
        self.bias_ids, self.bias_values = self._bias_ids.tensor, self._bias_values.tensor
        self.banned_ids = self._banned_ids.tensor
        # The kernels' to write.
        self.last_tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.in_prompt = torch.zeros(size, vocabulary_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(size, vocabulary_size, dtype=torch.int32, device=device)
        # What the host knows of its slots, to leave out what changes nothing.
        self.penalised: set[int] = set()
        self.biased: set[int] = set()
        self.banned: dict[int, int] = {}  # slot: the length from which on nothing is banned
        for slot in range(size):
            self._write_neutral(slot)
        self._upload()

    def assign(self, assignments: Iterable[SlotAssignment]) -> None:
        """Sequences take slots: everything the slots held before is forgotten. Block tables are empty then."""
        is_changed = False
        for assignment in assignments:
            is_changed = True
            self._assign_one(assignment)
        if is_changed:
            self._upload()
            self._tables.upload()

    def append_blocks(self, appends: Sequence[BlockAppend]) -> None:
        """Enters blocks into block tables."""
        if not appends:
            return
        table = self._tables.host
        for append in appends:
            table[append.slot, append.index] = append.block
        self._tables.upload()

    def set_blocks(self, slot: int, blocks: Sequence[int]) -> None:
        """The whole block table of one slot."""
        self._tables.host[slot, : len(blocks)] = blocks
        self._tables.upload()

    def row_sampling(self, row_slots: torch.Tensor, positions: torch.Tensor) -> RowSampling:
        """The parameters of rows in these slots. `positions`: int64 [R], tokens that each sequence has."""
        return RowSampling(
            temperature=self.temperature[row_slots],
            top_k=self.top_k[row_slots],
            top_p=self.top_p[row_slots],
            min_p=self.min_p[row_slots],
            seeds=self.seeds[row_slots],
            positions=positions,
        )

    def _write_neutral(self, slot: int) -> None:
        """Greedy, with nothing that changes a logit."""
        self._floats.host[:, slot] = (0, 1, 0, 1, 0, 0)
        self._integers.host[:, slot] = 0

    def _assign_one(self, assignment: SlotAssignment) -> None:
        slot, sampling = assignment.slot, assignment.sampling
        self._tables.host[slot] = 0
        self._floats.host[:, slot] = (
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        self._seeds.host[slot] = (assignment.seed & 0xFFFFFFFF, assignment.seed >> 32)
        banned_until, banned = assignment.banned_until or (0, ())
        if len(banned) > MAX_BANNED:
            raise ValueError(f"{len(banned)} tokens are banned in slot {slot}, at most {MAX_BANNED} can be")
        self._integers.host[:, slot] = (sampling.top_k, banned_until if banned else 0)
        self._banned_ids.host[slot] = -1
        self._banned_ids.host[slot, : len(banned)] = banned
        if banned:
            self.banned[slot] = banned_until
        else:
            self.banned.pop(slot, None)

        bias = sampling.logit_bias
        if bias or slot in self.biased:
            self._bias_ids.host[slot] = 0
            self._bias_values.host[slot] = 0
            self._bias_ids.host[slot, : len(bias)] = list(bias.keys())
            self._bias_values.host[slot, : len(bias)] = list(bias.values())
        (self.biased.add if bias else self.biased.discard)(slot)

        if sampling.has_penalties:
            self._reset_counts(assignment)
        (self.penalised.add if sampling.has_penalties else self.penalised.discard)(slot)

    def _reset_counts(self, assignment: SlotAssignment) -> None:
        """Only for sequences with penalties: nobody reads the counts of the others."""
        in_prompt, counts = self.in_prompt[assignment.slot], self.counts[assignment.slot]
        device = counts.device
        in_prompt.zero_()
        in_prompt[torch.tensor(assignment.prompt_token_ids, dtype=torch.int64, device=device)] = True
        counts.zero_()
        completion = torch.tensor(assignment.completion_token_ids, dtype=torch.int64, device=device)
        counts.index_add_(0, completion, torch.ones_like(completion, dtype=torch.int32))

    def _upload(self) -> None:
        for parameter in self._parameters:
            parameter.upload()
