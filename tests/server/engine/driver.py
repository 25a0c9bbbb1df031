"""A minimal scheduler for engine tests: gives sequences slots and blocks, makes batches of them, reads what comes back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hotgraph_server.batch import Batch, BlockAppend, Row, Sampler, SlotAssignment, StepOutput
from hotgraph_server.engine.contract import ContractChecker
from hotgraph_server.engine.interface import Engine
from hotgraph_server.request import SamplingParams, TokenLogprobs

_ORDER = (Sampler.GREEDY, Sampler.GUMBEL, Sampler.FILTERED)


@dataclass
class Track:
    """One sequence and where it is."""

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    seed: int = 0
    completion: list[int] = field(default_factory=list)
    banned_until: tuple[int, tuple[int, ...]] | None = None
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    num_scheduled: int = 0
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    has_failed: bool = False


class Driver:
    """Drives one engine. Every batch is checked against the contract before it is submitted."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
        self.checker = ContractChecker(engine.info)
        self.outputs: list[StepOutput] = []
        self.next_step = 0
        self.is_checked = False
        self._rng = random.Random(seed)
        self._free_blocks = list(range(1, engine.info.num_blocks))
        self._rng.shuffle(self._free_blocks)
        self._free_slots = list(range(engine.info.num_slots))
        self._rng.shuffle(self._free_slots)
        self._new: list[Track] = []

    def admit(self, sequence: Track) -> Track:
        """Gives the sequence a slot; its first chunk comes with a later step."""
        sequence.slot = self._free_slots.pop()
        sequence.num_scheduled = 0
        sequence.blocks = []
        self._new.append(sequence)
        return sequence

    def leave(self, sequence: Track) -> None:
        """Takes slot and blocks back."""
        self._free_slots.append(sequence.slot)
        self._free_blocks.extend(sequence.blocks)
        sequence.slot = -1

    def batch(
        self,
        parts: Iterable[tuple[Track, int | None]],
        *,
        num_logprobs: int | None = None,
        sampler: Sampler | None = None,
        is_eager: bool = False,
    ) -> Batch:
        """A batch of (sequence, number of its known tokens to take; None: decode)."""
        rows: list[Row] = []
        appends: list[BlockAppend] = []
        needed = Sampler.GREEDY if num_logprobs is None else Sampler.FILTERED
        for sequence, num_tokens in parts:
            known = (*sequence.prompt, *sequence.completion)
            start = sequence.num_scheduled
            count = 1 if num_tokens is None else num_tokens
            token_ids = None if num_tokens is None else known[start : start + count]
            is_sampled = num_tokens is None or start + count >= len(known)
            while len(sequence.blocks) * self.engine.info.block_size < start + count:
                block = self._free_blocks.pop()
                appends.append(BlockAppend(sequence.slot, len(sequence.blocks), block))
                sequence.blocks.append(block)
            rows.append(Row(sequence.slot, start, count, token_ids, is_sampled))
            sequence.num_scheduled += count
            needed = max(needed, _needed(sequence), key=_ORDER.index)
        assignments = [
            SlotAssignment(s.slot, s.sampling, s.seed, s.prompt, tuple(s.completion), s.banned_until) for s in self._new
        ]
        self._new = []
        batch = Batch(self.next_step, rows, assignments, appends, sampler or needed, num_logprobs, is_eager)
        self.next_step += 1
        return batch

    async def step(
        self,
        parts: Sequence[tuple[Track, int | None]],
        *,
        num_logprobs: int | None = None,
        sampler: Sampler | None = None,
        is_eager: bool = False,
    ) -> StepOutput:
        """One step, its tokens taken in."""
        batch = self.batch(parts, num_logprobs=num_logprobs, sampler=sampler, is_eager=is_eager)
        self.checker.check(batch)
        self.is_checked = True
        output = await self.engine.step(batch)
        self.take(parts, batch, output)
        return output

    def take(self, parts: Sequence[tuple[Track, int | None]], batch: Batch, output: StepOutput) -> None:
        """Gives a step's tokens to its sequences."""
        assert output.step == batch.step
        self.outputs.append(output)
        for index, (sequence, _) in enumerate(parts):
            token_id = output.token_ids[index]
            if index in output.failed_rows:
                sequence.has_failed = True
                assert token_id is None
            elif batch.rows[index].is_sampled:
                assert token_id is not None
                sequence.completion.append(token_id)
                if output.logprobs:
                    sequence.logprobs.append(output.logprobs[index])
            else:
                assert token_id is None
            if batch.rows[index].is_sampled and self.is_checked:
                self.checker.add_sampled(batch.rows[index].slot, token_id)

    async def run(
        self,
        sequences: Sequence[Track],
        num_tokens: int,
        *,
        chunk: int | Callable[[Track], int] = 10_000,
        num_logprobs: int | None = None,
        sampler: Sampler | None = None,
        is_eager: bool = False,
    ) -> None:
        """Admits the sequences, a new one each step, and runs all until each has `num_tokens` completion tokens."""
        waiting, running = list(sequences), list[Track]()
        limit = self.engine.info.max_step_tokens
        while waiting or running:
            if waiting:
                running.append(self.admit(waiting.pop(0)))
            parts: list[tuple[Track, int | None]] = []
            room = limit
            for sequence in running:
                left = len(sequence.prompt) + len(sequence.completion) - sequence.num_scheduled
                is_decode = left == 1 and sequence.num_scheduled >= len(sequence.prompt) and bool(sequence.completion)
                size = chunk(sequence) if callable(chunk) else chunk
                count = 1 if is_decode else min(left, size, room)
                if count < 1 or room < 1:
                    continue
                room -= count
                parts.append((sequence, None if is_decode else count))
            self._rng.shuffle(parts)
            await self.step(parts, num_logprobs=num_logprobs, sampler=sampler, is_eager=is_eager)
            for sequence in list(running):
                if len(sequence.completion) >= num_tokens or sequence.has_failed:
                    running.remove(sequence)
                    self.leave(sequence)


def _needed(sequence: Track) -> Sampler:
    sampling = sequence.sampling
    if sampling.has_filters or sampling.has_penalties or sampling.logit_bias or sequence.banned_until:
        return Sampler.FILTERED
    return Sampler.GREEDY if sampling.is_greedy else Sampler.GUMBEL
