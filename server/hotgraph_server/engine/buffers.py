"""One step's static tensors: what the host fills in, what the model reads, what sampling writes. Allocated once.

What the host knows of the step that was filled in last stands apart, in `HostStep`: a bound step function may use it only
where graphs have no fixed shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hotgraph_server.batch import Batch, Row
from hotgraph_server.config import BOUNDS
from hotgraph_server.engine.mirrored import Mirrored
from hotgraph_server.engine.slots import SlotTables
from hotgraph_server.kernels.prepare import FROM_SLOT, LAST_TOKEN
from hotgraph_server.models.interface import StepTensors
from hotgraph_server.request import TokenLogprobs

if TYPE_CHECKING:
    from hotgraph_server.kernels.sample_triton import BlockResults, PlainSampling


@dataclass(frozen=True, slots=True)
class SamplingWork:
    """Which parts of the filtered sampler have anything to do. What is left out would change no number."""

    has_penalties: bool = True
    has_bias: bool = True
    has_bans: bool = True
    num_logprobs: int | None = BOUNDS.max_logprobs


ALL_WORK = SamplingWork()
"""For graphs of a fixed shape, which must be able to do everything."""


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step as it was filled in, padding left out. `order[i]` is the batch's index of row i; rows of one token first."""

    num_tokens: int
    num_rows: int
    num_decode_rows: int
    query_lens: list[int]
    context_lens: list[int]
    order: Sequence[int]
    work: SamplingWork


@dataclass(frozen=True, slots=True)
class StepResults:
    """What a step's rows gave, in the step's order: `token_ids` (-1: the logits were not finite), the largest logit of each
    row, and the log-probability of its token where that was computed."""

    token_ids: list[int]
    peaks: list[float]
    logprobs: list[float]


class RunLostError(RuntimeError):
    """A run left no results in the ring: what was launched was not the step that it should have been."""


class StepBuffers:
    """Room for `max_tokens` tokens of `max_rows` rows of `slots`. Views of it are what a step function is bound to.

    Results go to a ring of `depth` places, one a run. `num_runs` must be told of each (`note_run`); a run's results stand
    there until `depth` more were launched.
    """

    def __init__(
        self,
        slots: SlotTables,
        *,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        device: torch.device,
        num_stages: int = 1,
    ) -> None:
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.slots = slots
        self.num_runs = 0
        # One array from the host, so that one copy brings it to the device.
        sizes = {
            "row_slots": max_rows,
            "row_starts": max_rows,
            "is_sampled": max_rows,
            "row_offsets": max_rows + 1,
            "given_ids": max_tokens,
        }
        self._packed = Mirrored((sum(sizes.values()),), np.int64, device, num_stages=num_stages)
        self._uploaded = self._packed.host.copy()
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
        # What sampling writes: `values` are each row's largest logit and the log-probability of its token.
        self.values = zeros(2, max_rows, dtype=torch.float32)
        self.top_ids = zeros(max_rows, BOUNDS.max_logprobs)
        self.top_logprobs = zeros(max_rows, BOUNDS.max_logprobs, dtype=torch.float32)
        self.counter = zeros(1)

        # What the host reads.
        def ring(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((num_stages, *shape), dtype=dtype, pin_memory=device.type != "cpu")

        self.ring_ids = ring(1 + max_rows, dtype=torch.int64)
        self.ring_values = ring(2, max_rows, dtype=torch.float32)
        self._ring_top_ids = ring(max_rows, BOUNDS.max_logprobs, dtype=torch.int64)
        self._ring_top_logprobs = ring(max_rows, BOUNDS.max_logprobs, dtype=torch.float32)

        self.step = HostStep(0, 0, 0, [], [], (), ALL_WORK)

        # What the plain samplers' kernels work with. None where torch's operations do their work.
        self.plain: tuple[PlainSampling, BlockResults] | None = None
        if device.type == "cuda":
            self.plain = self.plain_sampling()

    def plain_sampling(self) -> tuple[PlainSampling, BlockResults]:
        """The tensors here and in the slots that plain samplers read and write, and new room for the results of blocks."""
        # Torch for the CPU alone comes without Triton.
        from hotgraph_server.kernels.sample_triton import BlockResults, PlainSampling

        slots = self.slots
        sampling = PlainSampling(
            row_slots=self.row_slots,
            context_lens=self.context_lens,
            is_sampled=self.is_sampled,
            temperature=slots.temperature,
            seeds=slots.seeds,
            last_tokens=slots.last_tokens,
            lengths=slots.lengths,
            values=self.values,
            ring_ids=self.ring_ids,
            ring_values=self.ring_values,
            counter=self.counter,
        )
        return sampling, BlockResults.allocate(self.max_rows, slots.vocabulary_size, self.counter.device)

    def fill(self, batch: Batch, tokens: int, rows: int) -> HostStep:
        """Lays a batch out in the shape (tokens, rows), which holds it; what is over becomes padding.

        Nothing is uploaded when the device has it all: a decode step's tokens and lengths are known there.
        """
        slots = self.slots
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
        self._host_starts[:num_rows] = [FROM_SLOT if row.token_ids is None else row.start for row in ordered]
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
        if not np.array_equal(self._packed.host, self._uploaded):
            self._packed.upload()
            np.copyto(self._uploaded, self._packed.host)

        work = SamplingWork(
            has_penalties=not slots.penalised.isdisjoint(row_slots),
            has_bias=not slots.biased.isdisjoint(row_slots),
            has_bans=bool(slots.banned)
            and any(length < slots.banned.get(slot, 0) for slot, length in zip(row_slots, context_lens, strict=True)),
            num_logprobs=batch.num_logprobs,
        )
        self.step = HostStep(num_tokens, num_rows, num_decode_rows, query_lens, context_lens, order, work)
        return self.step

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

    def note_run(self, num_logprobs: int | None = None) -> int:
        """A step was launched: returns the number it has in the ring. `num_logprobs`: most likely tokens that will be read."""
        number, self.num_runs = self.num_runs, self.num_runs + 1
        if num_logprobs:
            place = number % len(self.ring_ids)
            self._ring_top_ids[place].copy_(self.top_ids, non_blocking=True)
            self._ring_top_logprobs[place].copy_(self.top_logprobs, non_blocking=True)
        return number

    def results(self, number: int, num_rows: int) -> StepResults:
        """The results of a run that is over. Raises RunLostError when the ring holds another's."""
        place = number % len(self.ring_ids)
        found, *token_ids = self.ring_ids[place, : 1 + num_rows].tolist()
        if found != number:
            raise RunLostError(f"the ring holds the results of run {found}, not of run {number}")
        peaks, logprobs = self.ring_values[place, :, :num_rows].tolist()
        return StepResults(token_ids, peaks, logprobs)

    def read(
        self, batch: Batch, step: HostStep, number: int
    ) -> tuple[list[int | None], list[TokenLogprobs | None], list[int]]:
        """A run's token ids, log-probabilities (empty unless asked for) and failed rows, by batch row, once it is over."""
        results = self.results(number, step.num_rows)
        token_ids: list[int | None] = [None] * step.num_rows
        failed_rows: list[int] = []
        for found, index in zip(results.token_ids, step.order, strict=True):
            if found < 0:
                failed_rows.append(index)
            elif batch.rows[index].is_sampled:
                token_ids[index] = found
        logprobs: list[TokenLogprobs | None] = []
        if batch.num_logprobs is not None:
            place, num_top = number % len(self.ring_ids), batch.num_logprobs
            top_ids: list[list[int]] = self._ring_top_ids[place, : step.num_rows, :num_top].tolist()
            top_values: list[list[float]] = self._ring_top_logprobs[place, : step.num_rows, :num_top].tolist()
            logprobs = [None] * step.num_rows
            for position, index in enumerate(step.order):
                if (token_id := token_ids[index]) is not None:
                    top = tuple(zip(top_ids[position], top_values[position], strict=True))
                    logprobs[index] = TokenLogprobs((token_id, results.logprobs[position]), top)
        return token_ids, logprobs, sorted(failed_rows)
