"""All that a step reads and writes beside weights and KV cache. The served one, and a shadow of it to try things out on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hotgraph_server.batch import Batch
from hotgraph_server.engine.buffers import HostStep, StepBuffers
from hotgraph_server.engine.slots import SlotTables
from hotgraph_server.models.interface import Arena, Model


@dataclass(frozen=True, slots=True)
class StepState:
    """Slot tables, step buffers, and the model's activations where it wants them in place. One thread uses it at a time."""

    slots: SlotTables
    buffers: StepBuffers
    arena: Arena | None

    @classmethod
    def allocate(
        cls,
        model: Model,
        *,
        num_slots: int,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        num_stages: int,
    ) -> StepState:
        """Memory on the model's device. `num_stages`: steps that may be launched until the first of them is over.

        Raises RuntimeError or MemoryError when there is not enough.
        """
        device: torch.device = model.device
        slots = SlotTables(
            num_slots=num_slots,
            max_blocks=max_blocks,
            vocabulary_size=model.vocabulary_size,
            device=device,
            num_stages=num_stages,
        )
        buffers = StepBuffers(
            slots,
            max_tokens=max_tokens,
            max_rows=max_rows,
            max_blocks=max_blocks,
            device=device,
            num_stages=num_stages,
        )
        return cls(slots, buffers, model.arena(max_tokens, max_rows))

    def fill(self, batch: Batch, rows: int, *, probe_blocks: Sequence[int] = ()) -> HostStep:
        """Everything that the batch says reaches the next run, which has `rows` rows, and tokens enough.

        `probe_blocks`: the probe slot's block table, if it is used.
        """
        self.slots.assign(batch.assignments)
        self.slots.append_blocks(batch.block_appends)
        if probe_blocks:
            self.slots.set_blocks(self.slots.probe_slot, probe_blocks)
        self.slots.upload()
        return self.buffers.fill(batch, rows)
