"""kernels/prepare.py against a loop over rows and tokens."""

from __future__ import annotations

import random

import torch

from hotgraph_server.kernels.prepare import LAST_TOKEN, prepare_step

BLOCK_SIZE = 4
MAX_BLOCKS = 6
NUM_SLOTS = 9


def test_equals_a_loop() -> None:
    """Decode and prefill rows in any slots, with and without padding, give what a plain loop gives."""
    rng = random.Random(2)
    for _ in range(40):
        num_rows, padding_rows, padding_tokens = rng.randint(1, 5), rng.choice([0, 3]), rng.choice([0, 6])
        slots = rng.sample(range(NUM_SLOTS - 1), num_rows)
        lengths = sorted((rng.choice([1, 1, 2, 5]) for _ in range(num_rows)), key=lambda length: length != 1)
        starts = [rng.randint(0, MAX_BLOCKS * BLOCK_SIZE - length) for length in lengths]
        last_tokens = torch.randint(0, 1000, (NUM_SLOTS,))
        tables = torch.randint(1, 50, (NUM_SLOTS, MAX_BLOCKS), dtype=torch.int32)
        tables[NUM_SLOTS - 1] = 0

        given: list[int] = []
        expected: list[tuple[int, int, int]] = []
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            for offset in range(length):
                token_id = rng.randrange(1000)
                is_last = length == 1 and rng.random() < 0.5
                given.append(LAST_TOKEN if is_last else token_id)
                position = start + offset
                block = tables[slot, position // BLOCK_SIZE].item()
                expected.append(
                    (
                        int(last_tokens[slot]) if is_last else token_id,
                        position,
                        int(block) * BLOCK_SIZE + position % BLOCK_SIZE,
                    )
                )
        num_tokens = len(given)
        offsets = [sum(lengths[:row]) for row in range(num_rows + 1)] + [num_tokens] * padding_rows
        tokens, rows = num_tokens + padding_tokens, num_rows + padding_rows
        out = {
            "token_ids": torch.full((tokens,), 77),
            "positions": torch.full((tokens,), 77),
            "kv_indices": torch.full((tokens,), 77),
            "block_tables": torch.full((rows, MAX_BLOCKS), 77, dtype=torch.int32),
            "context_lens": torch.full((rows,), 77, dtype=torch.int32),
            "query_starts": torch.full((rows + 1,), 77, dtype=torch.int32),
            "last_indices": torch.full((rows,), 77),
        }
        all_slots = slots + [NUM_SLOTS - 1] * padding_rows
        prepare_step(
            given_ids=torch.tensor(given + [0] * padding_tokens),
            row_slots=torch.tensor(all_slots),
            row_starts=torch.tensor(starts + [0] * padding_rows),
            row_offsets=torch.tensor(offsets),
            last_tokens=last_tokens,
            slot_block_tables=tables,
            block_size=BLOCK_SIZE,
            **out,
        )
        got = list(zip(out["token_ids"].tolist(), out["positions"].tolist(), out["kv_indices"].tolist(), strict=True))
        assert got[:num_tokens] == expected
        assert all(triple == (0, 0, 0) for triple in got[num_tokens:])
        assert torch.equal(out["block_tables"], tables[all_slots])
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        assert out["context_lens"].tolist() == ends + [0] * padding_rows
        assert out["query_starts"].tolist() == offsets
        assert out["last_indices"][:num_rows].tolist() == [end - 1 for end in offsets[1 : num_rows + 1]]
        assert bool((out["last_indices"] < tokens).all())
