"""Random inputs of `prepare_step`, with room for its results and what a plain loop makes of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from hotgraph_server.kernels.prepare import StepSource
from hotgraph_server.kernels.prepare_stage import IS_LAST, IS_NEW, IS_SAMPLED, RowRecord, StageLayout

BLOCK_SIZE = 4
NUM_SLOTS = 150
NUM_PARAMETERS = 14
UNWRITTEN = 77
_ODD = -(2**30)  # stands wherever nothing may be read


@dataclass
class RandomStep:
    """`source` and `results` are the arguments of `prepare_step`; `expected` has the names of `results`.

    `tables` and `parameters`: what those of `source` must become.
    """

    source: StepSource
    results: dict[str, torch.Tensor]
    expected: dict[str, list[int] | list[list[int]]]
    tables: list[list[int]]
    parameters: list[list[int]]

    def source_on(self, device: torch.device) -> StepSource:
        """A copy. On a GPU the stages are pinned, as they are when served."""
        source = self.source
        stages = source.stages.clone()
        return replace(
            source,
            stages=stages if device.type == "cpu" else stages.pin_memory(),
            counter=source.counter.to(device, copy=True),
            last_tokens=source.last_tokens.to(device, copy=True),
            block_tables=source.block_tables.to(device, copy=True),
            parameters=source.parameters.to(device, copy=True),
        )


@dataclass
class _Change:
    """What a stage says of one slot."""

    is_new: bool
    first_block: int
    blocks: list[int]
    parameters: list[int]


def random_step(
    rng: random.Random,
    *,
    min_rows: int = 1,
    max_rows: int = 5,
    max_blocks: int = 6,
    lengths: tuple[int, ...] = (1, 1, 2, 5),
    has_changes: bool = True,
) -> RandomStep:
    """Decode rows, then prefill rows, in any slots, with or without padding; tokens from the host or the slot.

    Slots are as they were, new, or have a few new blocks; now and then two rows share a slot.
    """
    num_rows, padding_rows, padding_tokens = rng.randint(min_rows, max_rows), rng.choice([0, 3]), rng.choice([0, 6])
    slots = rng.sample(range(NUM_SLOTS - 1), num_rows)
    if rng.random() < 0.3:
        slots[-1] = slots[0]
    counts = sorted((rng.choice(lengths) for _ in range(num_rows)), key=lambda length: length != 1)
    starts = [rng.randint(0, max_blocks * BLOCK_SIZE - length) for length in counts]
    last_tokens = [rng.randrange(1000) for _ in range(NUM_SLOTS)]
    tables = [[rng.randrange(1, 50) for _ in range(max_blocks)] for _ in range(NUM_SLOTS - 1)] + [[0] * max_blocks]
    parameters = [[rng.randrange(-(2**31), 2**31) for _ in range(NUM_PARAMETERS)] for _ in range(NUM_SLOTS)]

    total = sum(counts)
    layout = StageLayout(num_rows + padding_rows + 2, total + padding_tokens + 1, max_blocks, NUM_PARAMETERS)
    stages = torch.full((rng.randint(1, 4), layout.num_words), _ODD, dtype=torch.int32)
    counter = rng.randrange(2**40)
    source = StepSource(
        layout,
        stages,
        torch.tensor([counter]),
        torch.tensor(last_tokens),
        torch.tensor(tables, dtype=torch.int32),
        torch.tensor(parameters, dtype=torch.int32),
    )
    stage = stages[counter % len(stages)]

    changes = {slot: _draw_change(rng, max_blocks) for slot in slots if has_changes and rng.random() < 0.6}
    for slot, change in changes.items():
        row, end_block = slots.index(slot), change.first_block + len(change.blocks)
        layout.tables(stage)[row, change.first_block : end_block] = torch.tensor(change.blocks, dtype=torch.int32)
        if change.is_new:
            layout.parameters(stage)[row] = torch.tensor(change.parameters, dtype=torch.int32)
            parameters[slot] = change.parameters
            tables[slot] = [0] * max_blocks
        tables[slot][change.first_block : end_block] = change.blocks

    records: list[RowRecord] = []
    expected: dict[str, list[int]] = {"token_ids": [], "positions": [], "kv_indices": []}
    is_sampled = []
    for slot, start, length in zip(slots, starts, counts, strict=True):
        offset = len(expected["token_ids"])
        is_last = length == 1 and rng.random() < 0.5
        is_sampled.append(int(rng.random() < 0.7))
        for position in range(start, start + length):
            token_id = rng.randrange(1000)
            if not is_last:
                layout.token_ids(stage)[len(expected["token_ids"])] = token_id
            block = tables[slot][position // BLOCK_SIZE]
            expected["token_ids"].append(last_tokens[slot] if is_last else token_id)
            expected["positions"].append(position)
            expected["kv_indices"].append(block * BLOCK_SIZE + position % BLOCK_SIZE)
        flags = (IS_SAMPLED if is_sampled[-1] else 0) | (IS_LAST if is_last else 0)
        record = RowRecord(slot, start, offset, offset + length, flags)
        if slot in changes:
            change = changes[slot]
            record = record._replace(
                flags=flags | (IS_NEW if change.is_new else 0),
                source=slots.index(slot),
                first_block=change.first_block,
                end_block=change.first_block + len(change.blocks),
            )
        records.append(record)
    records += [RowRecord(NUM_SLOTS - 1, 0, total, total, 0)] * padding_rows
    layout.records(stage)[: len(records)] = torch.tensor(records, dtype=torch.int32)

    tokens, rows = total + padding_tokens, num_rows + padding_rows
    all_slots = [record.slot for record in records]

    def unwritten(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(size, UNWRITTEN, dtype=dtype)

    return RandomStep(
        source,
        {
            "row_slots": unwritten(rows),
            "is_sampled": unwritten(rows),
            "token_ids": unwritten(tokens),
            "positions": unwritten(tokens),
            "kv_indices": unwritten(tokens),
            "block_tables": unwritten(rows, max_blocks, dtype=torch.int32),
            "context_lens": unwritten(rows, dtype=torch.int32),
            "query_starts": unwritten(rows + 1, dtype=torch.int32),
            "last_indices": unwritten(rows),
        },
        {
            **{name: values + [0] * padding_tokens for name, values in expected.items()},
            "row_slots": list(all_slots),
            "is_sampled": is_sampled + [0] * padding_rows,
            "block_tables": [tables[slot] for slot in all_slots],
            "context_lens": [start + count for start, count in zip(starts, counts, strict=True)] + [0] * padding_rows,
            "query_starts": [0, *(record.end for record in records)],
            "last_indices": [record.end - 1 for record in records],
        },
        tables,
        parameters,
    )


def _draw_change(rng: random.Random, max_blocks: int) -> _Change:
    num_blocks = rng.randint(0, max_blocks)
    return _Change(
        is_new=rng.random() < 0.5,
        first_block=rng.randint(0, max_blocks - num_blocks),
        blocks=[rng.randrange(50, 100) for _ in range(num_blocks)],
        parameters=[rng.randrange(-(2**31), 2**31) for _ in range(NUM_PARAMETERS)],
    )
