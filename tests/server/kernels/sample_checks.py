"""The fused samplers against the plain torch beside them: the same checks in Triton's interpreter and on a GPU.

A check draws fresh inputs, runs both for a few steps from the same state, and compares to the bit all that either writes.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import torch
import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.noise import gumbel_noise
from hotgraph_server.kernels.sample_triton import (
    BlockResults,
    PlainSampling,
    row_noise,
    sample_plain,
    sample_plain_triton,
)

DEPTH = 3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw_step(rng: random.Random, num_rows: int, device: torch.device, *, max_rows: int | None = None) -> PlainSampling:
    """Slots in any order, rows that are not sampled, padding rows in the scratch slot, temperatures with 0 among them."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    max_rows = num_rows + rng.randint(0, 3) if max_rows is None else max_rows
    num_slots = max_rows + 4
    scratch_slot = num_slots - 2

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    row_slots = torch.randperm(num_slots - 2, generator=generator)[:max_rows]
    is_sampled = (torch.rand(max_rows, generator=generator) < 0.8).long()
    num_padding = rng.randint(0, num_rows // 3)
    context_lens = draw(0, rng.choice([50, 2**31 - 1]), max_rows)
    if num_padding:
        padding = slice(num_rows - num_padding, num_rows)
        row_slots[padding], is_sampled[padding], context_lens[padding] = scratch_slot, 0, 0
    parameters = torch.randn(num_slots, 6, generator=generator)
    parameters[:, 0] = torch.tensor([0.0, 1e-3, 0.5, 0.7, 1.0, 1.9])[draw(0, 6, num_slots)]
    return PlainSampling(
        row_slots=row_slots.to(device),
        context_lens=context_lens.int().to(device),
        is_sampled=is_sampled.to(device),
        temperature=parameters.to(device)[:, 0],
        seeds=draw(0, 2**32, num_slots, 2).to(device),
        last_tokens=draw(0, 1000, num_slots).to(device),
        values=torch.randn(2, max_rows, generator=generator).to(device),
        ring_ids=draw(-9, -1, DEPTH, 1 + max_rows).to(device),
        ring_values=torch.randn(DEPTH, 2, max_rows, generator=generator).to(device),
        counter=draw(0, 2**40, 1).to(device),
    )


def draw_logits(
    rng: random.Random, num_rows: int, vocabulary_size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Rows of all kinds: plain, with many ties, with the largest logit twice, masked in part, and those that must fail.

    They may stand in wider rows, of which the rest is NaN.
    """
    generator = torch.Generator(device).manual_seed(rng.getrandbits(60))
    wide = torch.full((num_rows, vocabulary_size + rng.choice([0, 8, 13])), torch.nan, dtype=dtype, device=device)
    logits = wide[:, :vocabulary_size]
    drawn = torch.randn(num_rows, vocabulary_size, generator=generator, device=device) * rng.choice([0.1, 3.0, 12.0])
    logits.copy_(drawn)
    for row in logits:
        places = [rng.randrange(vocabulary_size) for _ in range(3)]
        kinds = ["plain", "plain", "low", "round", "tie", "flat", "masked", "nan", "infinite", "impossible"]
        match rng.choice(kinds):
            case "low":
                row.sub_(200)
            case "round":
                row.copy_(row.mul(0.5).round())
            case "tie":
                row[places] = row.max() + 1.5
            case "flat":
                row.fill_(rng.choice([0.0, -3.25]))
            case "masked":
                is_masked = torch.rand(vocabulary_size, generator=generator, device=device) < rng.choice([0.5, 0.999])
                row.masked_fill_(is_masked, -torch.inf)
                row[places[0]] = -7.5
            case "nan":
                nan = torch.tensor(torch.nan)
                row[places[0]] = rng.choice([nan, -nan])  # the sign is a bit of it
                row[places[1]] = rng.choice([1.0, torch.inf, -torch.inf])
            case "infinite":
                row[places[:2]] = torch.inf
            case "impossible":
                row.fill_(-torch.inf)
    return logits


def copied(step: PlainSampling) -> PlainSampling:
    """The same state, to be changed alone. Its temperatures stand side by side."""
    return PlainSampling(**{name: tensor.clone() for name, tensor in named(step)})


def named(step: PlainSampling) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors."""
    for field in dataclasses.fields(step):
        yield field.name, getattr(step, field.name)


def assert_same(found: PlainSampling, expected: PlainSampling) -> None:
    """To the bit, in all that may be written and all that may not."""
    for name, tensor in named(expected):
        other = getattr(found, name)
        torch.testing.assert_close(other, tensor, rtol=0, atol=0, equal_nan=True, msg=f"{name}: {other} for {tensor}")


def check_sample_plain(
    num_rows: int,
    vocabulary_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_greedy: bool,
    seed: int,
    num_steps: int = 2,
) -> None:
    """Steps one after another in the same buffers: tokens, largest logits, slots, ring and counter."""
    rng = random.Random(seed)
    found = draw_step(rng, num_rows, device)
    expected = copied(found)
    blocks = BlockResults.allocate(expected.values.shape[1], vocabulary_size, device)
    for _ in range(num_steps):
        logits = draw_logits(rng, num_rows, vocabulary_size, dtype, device)
        before = logits.clone()
        sample_plain(logits, expected, is_greedy=is_greedy)
        sample_plain_triton(logits, found, blocks, is_greedy=is_greedy)
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
        assert_same(found, expected)


@triton.jit  # type: ignore[untyped-decorator]
def _noise_kernel(
    out: tl.tensor, seeds: tl.tensor, positions: tl.tensor, first: tl.tensor, block: tl.constexpr
) -> None:
    row = tl.program_id(1)
    place = tl.program_id(0) * block + tl.arange(0, block)
    low = tl.load(seeds + 2 * row).to(tl.uint32)
    high = tl.load(seeds + 2 * row + 1).to(tl.uint32)
    position = tl.load(positions + row).to(tl.uint32)
    noise = row_noise(first + place, low, high, position)
    tl.store(out + row * tl.num_programs(0) * block + place, noise)


def check_noise(num_rows: int, device: torch.device, *, seed: int) -> None:
    """To the bit, for any seeds and positions, and for tokens whose uniform number is the largest there is."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(0, 2**32, (num_rows, 2), generator=generator).to(device)
    positions = torch.randint(0, 2**31, (num_rows,), generator=generator).int().to(device)
    first = 7 * seed
    expected = gumbel_noise(seeds, positions.long(), first + 16384)[:, first:]
    found = torch.empty(num_rows, 16384, device=device)
    _noise_kernel[(16, num_rows)](found, seeds, positions, first, block=1024, enable_fp_fusion=False)
    assert torch.equal(found, expected)

    seeds = torch.tensor([[7, 9]], device=device)
    for position, token_id in ((6, 35106), (1102, 95881), (1721, 26556), (2975, 43589)):  # found by trying 400 million
        positions = torch.tensor([position], device=device)
        expected = gumbel_noise(seeds, positions, token_id + 512)[:, token_id - 512 :]
        found = torch.empty(1, 1024, device=device)
        _noise_kernel[(1, 1)](found, seeds, positions, token_id - 512, block=1024, enable_fp_fusion=False)
        assert torch.equal(found, expected)
        assert found.argmin() == 512
