"""kernels/penalties.py against the naive row by row reference."""

from __future__ import annotations

import math
import random

import torch

from hotgraph_server.kernels import penalties
from hotgraph_server.kernels.penalties import apply_bans, apply_bias, apply_penalties, count_tokens
from tests.server.kernels import naive_sampling

VOCABULARY = 61
NUM_SLOTS = 7


def close(actual: torch.Tensor, expected: list[list[float]]) -> None:
    """Equal up to float32."""
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_penalties_equal_the_naive_ones() -> None:
    """Repetition, presence and frequency, rows in any slots, equal the reference on random inputs."""
    rng = random.Random(1)
    for _ in range(20):
        prompts = [[rng.randrange(VOCABULARY) for _ in range(9)] for _ in range(NUM_SLOTS)]
        completions = [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(12))] for _ in range(NUM_SLOTS)]
        repetition = torch.tensor([rng.choice([1.0, 0.5, 1.3, 9.0]) for _ in range(NUM_SLOTS)])
        presence = torch.tensor([rng.uniform(-2, 2) for _ in range(NUM_SLOTS)])
        frequency = torch.tensor([rng.uniform(-2, 2) for _ in range(NUM_SLOTS)])
        in_prompt = torch.zeros(NUM_SLOTS, VOCABULARY, dtype=torch.bool)
        counts = torch.zeros(NUM_SLOTS, VOCABULARY, dtype=torch.int32)
        for slot in range(NUM_SLOTS):
            in_prompt[slot, prompts[slot]] = True
            for token_id in completions[slot]:
                counts[slot, token_id] += 1
        row_slots = torch.tensor(rng.sample(range(NUM_SLOTS), 4))
        logits = torch.randn(4, VOCABULARY) * 5
        expected = [
            naive_sampling.penalise(
                logits[row].tolist(),
                repetition=repetition[slot].item(),
                presence=presence[slot].item(),
                frequency=frequency[slot].item(),
                prompt=prompts[slot],
                completion=completions[slot],
            )
            for row, slot in enumerate(row_slots.tolist())
        ]
        apply_penalties(
            logits,
            row_slots,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
            in_prompt=in_prompt,
            counts=counts,
        )
        close(logits, expected)


def test_sparse_and_dense_ways_agree() -> None:
    """What the CPU does to seen tokens only is bit for bit what a device does to all."""
    for _ in range(10):
        logits = torch.randn(4, VOCABULARY) * 5
        tables = (
            torch.rand(NUM_SLOTS, VOCABULARY) < 0.2,
            torch.randint(0, 30, (NUM_SLOTS, VOCABULARY), dtype=torch.int32).sub_(26).clamp_(min=0),
        )
        parameters = (torch.rand(4) + 0.5, torch.randn(4), torch.randn(4))
        row_slots = torch.randperm(NUM_SLOTS)[:4]
        dense = logits.clone()
        penalties._penalise_all(dense, row_slots, *parameters, *tables)
        penalties._penalise_seen(logits, row_slots, *parameters, *tables)
        assert torch.equal(logits, dense)


def test_neutral_penalties_change_no_bit() -> None:
    """With penalties 1, 0, 0 logits stay bit for bit what they were, whatever was counted."""
    logits = torch.randn(3, VOCABULARY)
    before = logits.clone()
    apply_penalties(
        logits,
        torch.tensor([0, 2, 4]),
        repetition=torch.ones(NUM_SLOTS),
        presence=torch.zeros(NUM_SLOTS),
        frequency=torch.zeros(NUM_SLOTS),
        in_prompt=torch.ones(NUM_SLOTS, VOCABULARY, dtype=torch.bool),
        counts=torch.full((NUM_SLOTS, VOCABULARY), 3, dtype=torch.int32),
    )
    assert torch.equal(logits, before)


def test_bias_is_added_and_unused_entries_are_not() -> None:
    """Each biased token moves by its bias; tokens without one, token 0 among them, do not move."""
    logits = torch.randn(2, VOCABULARY)
    bias_ids = torch.zeros(NUM_SLOTS, 5, dtype=torch.int64)
    bias_values = torch.zeros(NUM_SLOTS, 5)
    bias_ids[3, :2] = torch.tensor([60, 7])
    bias_values[3, :2] = torch.tensor([-100.0, 2.5])
    expected = [
        naive_sampling.penalise(logits[0].tolist(), bias={60: -100.0, 7: 2.5}),
        logits[1].tolist(),
    ]
    apply_bias(logits, torch.tensor([3, 0]), bias_ids=bias_ids, bias_values=bias_values)
    close(logits, expected)


def test_bans_hold_until_the_length_is_reached() -> None:
    """Banned tokens, token 0 too, are impossible while the sequence is shorter than the limit, and free from then on."""
    banned_ids = torch.full((NUM_SLOTS, 4), -1)
    banned_ids[1, :2] = torch.tensor([0, 9])
    banned_until = torch.zeros(NUM_SLOTS, dtype=torch.int64)
    banned_until[1] = 20
    for position, is_banned in ((0, True), (19, True), (20, False), (21, False)):
        logits = torch.randn(2, VOCABULARY)
        before = logits.clone()
        apply_bans(
            logits,
            torch.tensor([1, 2]),
            torch.tensor([position, position]),
            banned_ids=banned_ids,
            banned_until=banned_until,
        )
        assert torch.equal(logits[1], before[1])
        assert logits[0].isinf().nonzero().flatten().tolist() == ([0, 9] if is_banned else [])
        assert logits[0, 0].item() == (-math.inf if is_banned else before[0, 0].item())


def test_counting_adds_only_rows_that_count() -> None:
    """A row's token is counted in its own slot, and only where the row counts."""
    counts = torch.zeros(NUM_SLOTS, VOCABULARY, dtype=torch.int32)
    row_slots, tokens = torch.tensor([4, 1, 5]), torch.tensor([10, 10, 3])
    count_tokens(counts, row_slots, tokens, torch.tensor([True, False, True]))
    count_tokens(counts, row_slots, tokens, torch.tensor([True, False, False]))
    assert counts[4, 10] == 2
    assert counts[5, 3] == 1
    assert counts.sum() == 3
