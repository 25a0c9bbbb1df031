"""One step's static tensors: what the host fills in, what the model reads, what sampling writes. Allocated once.

What the host knows of the step that was filled in last stands apart, in `HostStep`: a bound step function may use it only
where graphs have no fixed shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from hotgraph_server.batch import Batch, Row
from hotgraph_server.config import BOUNDS
from hotgraph_server.engine.slots import NUM_PARAMETER_WORDS, SlotTables
from hotgraph_server.engine.stages import Stages
from hotgraph_server.kernels.prepare import StepSource, prepare_step
from hotgraph_server.kernels.prepare_stage import IS_LAST, IS_SAMPLED, StageLayout
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

NO_WORK = SamplingWork(has_penalties=False, has_bias=False, has_bans=False, num_logprobs=None)


class HostStep(NamedTuple):
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

    What `fill` writes and what a run leaves lie in rings of `num_stages` places, one a run, that the device finds with a
    counter of its own. `num_runs` must be told of each run (`note_run`), before the next one is filled in. A place is used
    again after `num_stages` runs: the run that had it must be over by then, and its results read.
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
        layout = StageLayout(max_rows, max_tokens, max_blocks, NUM_PARAMETER_WORDS)
        self._stages = Stages(layout, num_stages, device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # What `prepare` writes, and the model and the sampler read.
        self.row_slots = zeros(max_rows)
        self.is_sampled = zeros(max_rows)
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
        self._source = StepSource(
            layout, self._stages.tensor, self.counter, slots.last_tokens, slots.block_tables, slots.parameters
        )

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
            values=self.values,
            ring_ids=self.ring_ids,
            ring_values=self.ring_values,
            counter=self.counter,
        )
        return sampling, BlockResults.allocate(self.max_rows, slots.vocabulary_size, self.counter.device)

    def fill(self, batch: Batch, rows: int) -> HostStep:
        """Writes down the next run's batch, in `rows` rows or fewer; those that are over become padding.

        Nothing is copied: `prepare` reads it, and what is new of the rows' slots.
        """
        slots, stages, number = self.slots, self._stages, self.num_runs
        held_slots = slots.held
        num_rows = len(batch.rows)
        order: Sequence[int] = range(num_rows)
        ordered: Sequence[Row] = batch.rows
        if num_rows > 1 and any(row.num_tokens > 1 for row in ordered):
            order = sorted(order, key=lambda index: batch.rows[index].num_tokens > 1)
            ordered = [batch.rows[index] for index in order]

        row_slots: list[int] = []
        query_lens: list[int] = []
        context_lens: list[int] = []
        token_ids: list[int] = []
        told: dict[int, tuple[int, int, int, int]] = {}  # of slots that changed: what their rows say of it
        num_tokens = num_decode_rows = 0
        has_ids = False
        for index, row in enumerate(ordered):
            slot, start, length = row.slot, row.start, row.num_tokens
            flags = IS_SAMPLED if row.is_sampled else 0
            if row.token_ids is None:
                flags |= IS_LAST
                token_ids.append(0)
            else:
                has_ids = True
                token_ids += row.token_ids
            offset = num_tokens
            num_tokens += length
            num_decode_rows += length == 1
            if held_slots[slot].is_changed:
                told[slot] = stages.write_slot(number, index, held_slots[slot])
            if told and slot in told:
                is_new, *change = told[slot]
                stages.write_row(number, index, slot, start, offset, num_tokens, flags | is_new, *change)
            else:
                stages.write_row(number, index, slot, start, offset, num_tokens, flags)
            row_slots.append(slot)
            query_lens.append(length)
            context_lens.append(start + length)
        for index in range(num_rows, rows):
            stages.write_row(number, index, slots.scratch_slot, 0, num_tokens, num_tokens, 0)
        if has_ids:
            stages.write_ids(number, token_ids)

        work = NO_WORK
        if slots.penalised or slots.biased or slots.banned or batch.num_logprobs is not None:
            work = SamplingWork(
                has_penalties=not slots.penalised.isdisjoint(row_slots),
                has_bias=not slots.biased.isdisjoint(row_slots),
                has_bans=bool(slots.banned)
                and any(
                    length < slots.banned.get(slot, 0) for slot, length in zip(row_slots, context_lens, strict=True)
                ),
                num_logprobs=batch.num_logprobs,
            )
        self.step = HostStep(num_tokens, num_rows, num_decode_rows, query_lens, context_lens, order, work)
        return self.step

    def prepare(self, tokens: int, rows: int, *, block_size: int) -> None:
        """The first work of a run: makes the shape's tensors and the slots' of what was filled in for it."""
        prepare_step(
            self._source,
            block_size=block_size,
            row_slots=self.row_slots[:rows],
            is_sampled=self.is_sampled[:rows],
            token_ids=self.token_ids[:tokens],
            positions=self.positions[:tokens],
            kv_indices=self.kv_indices[:tokens],
            block_tables=self.block_tables[:rows],
            context_lens=self.context_lens[:rows],
            query_starts=self.query_starts[: rows + 1],
            last_indices=self.last_indices[:rows],
        )

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
