"""Random inputs of `prepare_step`, with room for its results and what a plain loop makes of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from hotgraph_server.kernels.prepare import FROM_SLOT, LAST_TOKEN

BLOCK_SIZE = 4
NUM_SLOTS = 150
UNWRITTEN = 77


@dataclass
class RandomStep:
    """`inputs` and `results` together are the arguments of `prepare_step`; `expected` has the names of `results`."""

    inputs: dict[str, torch.Tensor]
    results: dict[str, torch.Tensor]
    expected: dict[str, list[int] | list[list[int]]]


def random_step(
    rng: random.Random, *, min_rows: int = 1, max_rows: int = 5, max_blocks: int = 6, has_slot_lens: bool = True
) -> RandomStep:
    """Decode rows, then prefill rows, in any slots, with or without padding; starts and tokens from the host or the slot."""
    num_rows, padding_rows, padding_tokens = rng.randint(min_rows, max_rows), rng.choice([0, 3]), rng.choice([0, 6])
    slots = rng.sample(range(NUM_SLOTS - 1), num_rows) + [NUM_SLOTS - 1] * padding_rows
    lengths = sorted((rng.choice([1, 1, 2, 5]) for _ in range(num_rows)), key=lambda length: length != 1)
    starts = [rng.randint(0, max_blocks * BLOCK_SIZE - length) for length in lengths]
    last_tokens = [rng.randrange(1000) for _ in range(NUM_SLOTS)]
    slot_lens = [rng.randrange(1000) for _ in range(NUM_SLOTS)]
    tables = [[rng.randrange(1, 50) for _ in range(max_blocks)] for _ in range(NUM_SLOTS - 1)] + [[0] * max_blocks]

    given: list[int] = []
    given_starts: list[int] = []
    expected: dict[str, list[int]] = {"token_ids": [], "positions": [], "kv_indices": []}
    for slot, start, length in zip(slots, starts, lengths, strict=False):
        is_from_slot = has_slot_lens and rng.random() < 0.5
        given_starts.append(FROM_SLOT if is_from_slot else start)
        if is_from_slot:
            slot_lens[slot] = start
        for position in range(start, start + length):
            token_id = rng.randrange(1000)
            is_last = length == 1 and rng.random() < 0.5
            given.append(LAST_TOKEN if is_last else token_id)
            block = tables[slot][position // BLOCK_SIZE]
            expected["token_ids"].append(last_tokens[slot] if is_last else token_id)
            expected["positions"].append(position)
            expected["kv_indices"].append(block * BLOCK_SIZE + position % BLOCK_SIZE)
    num_tokens = len(given)
    tokens, rows = num_tokens + padding_tokens, num_rows + padding_rows
    offsets = [sum(lengths[:row]) for row in range(num_rows + 1)] + [num_tokens] * padding_rows
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]

    def unwritten(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(size, UNWRITTEN, dtype=dtype)

    inputs = {
        "given_ids": torch.tensor(given + [0] * padding_tokens),
        "row_slots": torch.tensor(slots),
        "row_starts": torch.tensor(given_starts + [0] * padding_rows),
        "row_offsets": torch.tensor(offsets),
        "last_tokens": torch.tensor(last_tokens),
        "slot_block_tables": torch.tensor(tables, dtype=torch.int32),
    }
    if has_slot_lens:
        inputs["slot_lens"] = torch.tensor(slot_lens)
    return RandomStep(
        inputs,
        {
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
            "block_tables": [tables[slot] for slot in slots],
            "context_lens": ends + [0] * padding_rows,
            "query_starts": offsets,
            "last_indices": [end - 1 for end in offsets[1:]],
        },
    )
