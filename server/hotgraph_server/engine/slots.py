"""What the engine holds for each slot: last token, block table, sampling parameters, penalty counts. Tensors indexed by slot.

Two rows more than there are slots: the scratch slot, which padding rows read and write, and the probe slot, which belongs to
the verification of graphs.

Block tables and parameters travel with the next step that has a row in the slot (`HostSlot`): nobody else reads them. Biases
and bans, which are rare, are copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from struct import Struct

import numpy as np
import torch

from hotgraph_server.batch import BlockAppend, SlotAssignment
from hotgraph_server.config import BOUNDS
from hotgraph_server.engine.mirrored import Mirrored
from hotgraph_server.kernels.sample import RowSampling

MAX_BANNED = BOUNDS.max_stop_token_ids + 64
"""Stop tokens of a request, and the model's own ends of text."""

_PARAMETERS = Struct("=6f4q")
"""Of a slot: temperature, top-p, min-p, three penalties; top-k, the length that ends its ban, and the seed's halves."""

NUM_PARAMETER_WORDS = _PARAMETERS.size // 4


@dataclass(slots=True)
class HostSlot:
    """A slot as the host has it: `blocks` is its table, and `parameters` are words as they stand in SlotTables.parameters.

    The device is behind where the slot `is_new`, that is assigned, so that its parameters are others and all older blocks
    gone; and by blocks from `num_told` on. Who tells it notes that here.
    """

    parameters: bytes
    blocks: list[int] = field(default_factory=list)
    is_new: bool = False
    num_told: int = 0

    @property
    def is_changed(self) -> bool:
        return self.is_new or self.num_told < len(self.blocks)


class SlotTables:
    """All slots. Written by the host at assignments and block appends, by kernels when a row samples.

    `held` has each slot as the host has it. `upload` is called once for each step that changed anything, at most `num_stages`
    times until the first of them is over.
    """

    def __init__(
        self, *, num_slots: int, max_blocks: int, vocabulary_size: int, device: torch.device, num_stages: int = 1
    ) -> None:
        size = num_slots + 2
        self.scratch_slot = num_slots
        self.probe_slot = num_slots + 1
        self.vocabulary_size = vocabulary_size

        def mirrored(*row: int, dtype: type[np.generic]) -> Mirrored:
            return Mirrored((size, *row), dtype, device, num_stages=num_stages)

        # The host's to write. A row is a slot.
        neutral = _PARAMETERS.pack(0, 1, 0, 1, 0, 0, 0, 0, 0, 0)  # greedy, with nothing that changes a logit
        self.held = [HostSlot(neutral) for _ in range(size)]
        self._bias_ids = mirrored(BOUNDS.max_logit_bias, dtype=np.int64)
        self._bias_values = mirrored(BOUNDS.max_logit_bias, dtype=np.float32)
        self._banned_ids = mirrored(MAX_BANNED, dtype=np.int64)
        self._banned_ids.host.fill(-1)
        self._banned_ids.upload()
        # Slots whose rows were written since the last upload.
        self._changed_biases: set[int] = set()
        self._changed_bans: set[int] = set()
        # The kernels' to read, and `prepare_step`'s to write.
        self.block_tables = torch.zeros(size, max_blocks, dtype=torch.int32, device=device)
        words = np.frombuffer(neutral * size, np.int32).reshape(size, NUM_PARAMETER_WORDS)
        self.parameters = torch.tensor(words, device=device)
        self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency = (
            self.parameters[:, :6].view(torch.float32).unbind(1)
        )
        self.top_k, self.banned_until = self.parameters[:, 6:10].view(torch.int64).unbind(1)
        self.seeds = self.parameters[:, 10:].view(torch.int64)
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

    def assign(self, assignments: Iterable[SlotAssignment]) -> None:
        """Sequences take slots: everything the slots held before is forgotten. Block tables are empty then."""
        for assignment in assignments:
            self._assign_one(assignment)

    def append_blocks(self, appends: Iterable[BlockAppend]) -> None:
        """Enters blocks into block tables, each behind those that are there or in the place of one."""
        for append in appends:
            held, index = self.held[append.slot], append.index
            if index == len(held.blocks):
                held.blocks.append(append.block)
            else:
                held.blocks[index] = append.block
                held.num_told = min(held.num_told, index)

    def set_blocks(self, slot: int, blocks: Sequence[int]) -> None:
        """The whole block table of a slot that was assigned for this step."""
        self.held[slot].blocks = list(blocks)

    def upload(self) -> None:
        """Makes biases and bans that were written visible to the steps that are launched from now on."""
        if not (self._changed_biases or self._changed_bans):
            return
        for changed, arrays in (
            (self._changed_biases, (self._bias_ids, self._bias_values)),
            (self._changed_bans, (self._banned_ids,)),
        ):
            if changed:
                rows = list(changed)
                for array in arrays:
                    array.upload(rows)
                changed.clear()

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

    def _assign_one(self, assignment: SlotAssignment) -> None:
        slot, sampling = assignment.slot, assignment.sampling
        banned_until, banned = assignment.banned_until or (0, ())
        if len(banned) > MAX_BANNED:
            raise ValueError(f"{len(banned)} tokens are banned in slot {slot}, at most {MAX_BANNED} can be")
        parameters = _PARAMETERS.pack(
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.top_k,
            banned_until if banned else 0,
            assignment.seed & 0xFFFFFFFF,
            assignment.seed >> 32,
        )
        self.held[slot] = HostSlot(parameters, is_new=True)
        if banned or slot in self.banned:
            self._banned_ids.host[slot] = -1
            self._banned_ids.host[slot, : len(banned)] = banned
            self._changed_bans.add(slot)
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
            self._changed_biases.add(slot)
        (self.biased.add if bias else self.biased.discard)(slot)

        if sampling.has_penalties:
            self._reset_counts(assignment)
        (self.penalised.add if sampling.has_penalties else self.penalised.discard)(slot)

    def _reset_counts(self, assignment: SlotAssignment) -> None:
        """Only for sequences with penalties: nobody reads the counts of the others."""
        in_prompt = np.zeros(self.vocabulary_size, np.bool_)
        in_prompt[np.asarray(assignment.prompt_token_ids, np.int64)] = True
        completion = np.asarray(assignment.completion_token_ids, np.int64)
        counts = np.bincount(completion, minlength=self.vocabulary_size).astype(np.int32)
        for table, row in ((self.in_prompt, in_prompt), (self.counts, counts)):
            host = torch.from_numpy(row)
            if table.is_cuda:
                # Pinned memory that torch takes back once the copy is over: the host does not wait for it.
                host = host.pin_memory()
            table[assignment.slot].copy_(host, non_blocking=True)
