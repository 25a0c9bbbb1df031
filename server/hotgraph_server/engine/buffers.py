"""One step's static tensors: what the host fills in, what the model reads, what sampling writes. Allocated once.

What the host knows of the step in flight stands apart, in `HostStep`: a bound step function may use it only where graphs have
no fixed shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hotgraph_server.batch import Batch, Row
from hotgraph_server.config import BOUNDS
from hotgraph_server.engine.mirrored import Mirrored
from hotgraph_server.engine.slots import SlotTables
from hotgraph_server.kernels.prepare import LAST_TOKEN
from hotgraph_server.models.interface import StepTensors
from hotgraph_server.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class SamplingWork:
    """Which parts of the filtered sampler have anything to do. What is left out would change no number."""

    has_penalties: bool = True
    has_bias: bool = True
    has_bans: bool = True
    num_logprobs: int | None = BOUNDS.max_logprobs


ALL_WORK = SamplingWork()
"""For graphs of a fixed shape, which must be able to do everything."""


@dataclass(slots=True)
class HostStep:
    """The step that the buffers hold, padding left out. `order[i]` is the batch's index of row i; rows of one token first."""

    num_tokens: int
    num_rows: int
    num_decode_rows: int
    query_lens: list[int]
    context_lens: list[int]
    order: Sequence[int]
    work: SamplingWork


class StepBuffers:
    """Room for `max_tokens` tokens of `max_rows` rows. Views of it are what a step function is bound to."""

    def __init__(self, *, max_tokens: int, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        # One array from the host, so that one copy brings it to the device.
        sizes = {
            "row_slots": max_rows,
            "row_starts": max_rows,
            "is_sampled": max_rows,
            "row_offsets": max_rows + 1,
            "given_ids": max_tokens,
        }
        self._packed = Mirrored((sum(sizes.values()),), np.int64, device)
        ends = np.cumsum(list(sizes.values())).tolist()
        spans = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self._host_slots = self._packed.host[spans["row_slots"]]
        self._host_starts = self._packed.host[spans["row_starts"]]
        self._host_sampled = self._packed.host[spans["is_sampled"]]
        self._host_offsets = self._packed.host[spans["row_offsets"]]
        self._host_ids = self._packed.host[spans["given_ids"]]
        self.row_slots = self._packed.tensor[spans["row_slots"]]
        self.row_starts = self._packed.tensor[spans["row_starts"]]
        self.is_sampled = self._packed.tensor[spans["is_sampled"]]
        self.row_offsets = self._packed.tensor[spans["row_offsets"]]
        self.given_ids = self._packed.tensor[spans["given_ids"]]

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # What `prepare` writes and the model reads.
        self.token_ids = zeros(max_tokens)
        self.positions = zeros(max_tokens)
        self.kv_indices = zeros(max_tokens)
        self.block_tables = zeros(max_rows, max_blocks, dtype=torch.int32)
        self.context_lens = zeros(max_rows, dtype=torch.int32)
        self.query_starts = zeros(max_rows + 1, dtype=torch.int32)
        self.last_indices = zeros(max_rows)
        # What sampling writes and the host reads.
        self.sampled_ids = zeros(max_rows)
        self.is_finite = zeros(max_rows, dtype=torch.bool)
        self.chosen_logprobs = zeros(max_rows, dtype=torch.float32)
        self.top_ids = zeros(max_rows, BOUNDS.max_logprobs)
        self.top_logprobs = zeros(max_rows, BOUNDS.max_logprobs, dtype=torch.float32)

        self.step = HostStep(0, 0, 0, [], [], (), ALL_WORK)

    def fill(self, batch: Batch, tokens: int, rows: int, slots: SlotTables) -> None:
        """Lays a batch out in the shape (tokens, rows), which holds it; what is over becomes padding."""
        order: Sequence[int] = range(len(batch.rows))
        ordered: Sequence[Row] = batch.rows
        num_decode_rows = sum(row.num_tokens == 1 for row in ordered)
        if num_decode_rows < len(ordered):
            order = sorted(order, key=lambda index: batch.rows[index].num_tokens != 1)
            ordered = [batch.rows[index] for index in order]
        num_rows = len(ordered)
        row_slots = [row.slot for row in ordered]
        query_lens = [row.num_tokens for row in ordered]
        context_lens = [row.start + row.num_tokens for row in ordered]

        self._host_slots[:num_rows] = row_slots
        self._host_slots[num_rows:rows] = slots.scratch_slot
        self._host_starts[:num_rows] = [row.start for row in ordered]
        self._host_starts[num_rows:rows] = 0
        self._host_sampled[:num_rows] = [row.is_sampled for row in ordered]
        self._host_sampled[num_rows:rows] = 0
        self._host_offsets[1 : num_rows + 1] = np.cumsum(query_lens)
        num_tokens = int(self._host_offsets[num_rows])
        self._host_offsets[num_rows + 1 : rows + 1] = num_tokens
        self._host_ids[:num_decode_rows] = [
            LAST_TOKEN if row.token_ids is None else row.token_ids[0] for row in ordered[:num_decode_rows]
        ]
        end = num_decode_rows
        for row in ordered[num_decode_rows:]:
            start, end = end, end + row.num_tokens
            self._host_ids[start:end] = row.token_ids
        self._host_ids[num_tokens:tokens] = 0
        self._packed.upload()

        work = SamplingWork(
            has_penalties=not slots.penalised.isdisjoint(row_slots),
            has_bias=not slots.biased.isdisjoint(row_slots),
            has_bans=bool(slots.banned)
            and any(length < slots.banned.get(slot, 0) for slot, length in zip(row_slots, context_lens, strict=True)),
            num_logprobs=batch.num_logprobs,
        )
        self.step = HostStep(num_tokens, num_rows, num_decode_rows, query_lens, context_lens, order, work)

    def step_tensors(self, tokens: int, rows: int) -> StepTensors:
        """Views of a shape for the model, with the host's lengths of the step that the buffers hold."""
        step = self.step
        return StepTensors(
            token_ids=self.token_ids[:tokens],
            positions=self.positions[:tokens],
            kv_indices=self.kv_indices[:tokens],
            block_tables=self.block_tables[:rows],
            context_lens=self.context_lens[:rows],
            query_starts=self.query_starts[: rows + 1],
            last_indices=self.last_indices[:rows],
            query_lens=step.query_lens,
            host_context_lens=step.context_lens,
            num_decode_rows=step.num_decode_rows,
        )

    def read(self, batch: Batch) -> tuple[list[int | None], list[TokenLogprobs | None], list[int]]:
        """Waits for the step's results: token ids, log-probabilities (empty unless asked for) and failed rows, by batch row."""
        step = self.step
        num_rows = step.num_rows
        ids: list[int] = self.sampled_ids[:num_rows].tolist()
        is_finite: list[bool] = self.is_finite[:num_rows].tolist()
        token_ids: list[int | None] = [None] * num_rows
        failed_rows: list[int] = []
        for position, index in enumerate(step.order):
            if not is_finite[position]:
                failed_rows.append(index)
            elif batch.rows[index].is_sampled:
                token_ids[index] = ids[position]
        logprobs: list[TokenLogprobs | None] = []
        if batch.num_logprobs is not None:
            num_top = batch.num_logprobs
            chosen: list[float] = self.chosen_logprobs[:num_rows].tolist()
            top_ids: list[list[int]] = self.top_ids[:num_rows, :num_top].tolist()
            top_values: list[list[float]] = self.top_logprobs[:num_rows, :num_top].tolist()
            logprobs = [None] * num_rows
            for position, index in enumerate(step.order):
                if (token_id := token_ids[index]) is not None:
                    top = tuple(zip(top_ids[position], top_values[position], strict=True))
                    logprobs[index] = TokenLogprobs((token_id, chosen[position]), top)
        return token_ids, logprobs, sorted(failed_rows)
