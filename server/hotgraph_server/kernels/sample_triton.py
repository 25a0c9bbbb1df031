"""Greedy and Gumbel sampling on a GPU in two kernels that end a step: from its logits to the ring that the host reads.

It knows rows, slots and the ring, not what a filter or a penalty is. The numbers are those of `row_peaks`, `sample_greedy`,
`sample_gumbel` and `write_ring`, and the same tokens are chosen: noise and scores are computed by the same float32 operations
in the same order, with no product and sum fused to one rounding.

The first kernel looks at blocks of the vocabulary, the second at what they found. Which blocks there are does not depend on
the number of rows, and of equal scores the smallest token id wins in both, so that results do not depend on timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]  # it comes without types
from triton.language.extra import libdevice  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.again import launch
from hotgraph_server.kernels.jit import jit, next_power_of_two, tl
from hotgraph_server.kernels.ring import write_ring
from hotgraph_server.kernels.sample import RowSampling, row_peaks, sample_greedy, sample_gumbel

BLOCK_TOKENS = 1024
"""Of the vocabulary, for one program: at one row of 128,256 logits nearly every multiprocessor of an H100 has one."""

_BLOCK_WARPS = 8


@dataclass(frozen=True, slots=True)
class PlainSampling:
    """What the plain samplers read and write beside the logits, on their device. S slots, rows that are at least R.

    Read by row: `row_slots` int64, where a slot that repeats keeps what any one of its rows makes of it; `context_lens` int32,
    the tokens that the sequence has, which is the position of the one that is sampled; `is_sampled` int64, 0 for no.
    Read by slot: `temperature` float32 [S] and `seeds` int64 [S, 2], low and high 32 bits side by side, both maybe strided.

    Written by slot: `last_tokens`, int64 [S]. `values`: float32 [2, max_rows], of which row 0 takes each row's
    largest logit. `ring_ids` (int64 [D, 1 + max_rows]), `ring_values` (float32 [D, 2, max_rows]) and `counter` (int64 [1]) as
    in `write_ring`.
    """

    row_slots: torch.Tensor
    context_lens: torch.Tensor
    is_sampled: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    last_tokens: torch.Tensor
    values: torch.Tensor
    ring_ids: torch.Tensor
    ring_values: torch.Tensor
    counter: torch.Tensor


@dataclass(frozen=True, slots=True)
class BlockResults:
    """What the first kernel leaves for the second, of one step at a time: room for `max_rows` rows of B blocks.

    `peaks`: int32 [max_rows, B], each block's largest logit as `_ordered` has it; `scores`: float32 [max_rows, B], its best
    score; `token_ids`: int32 [max_rows, B], whose score that is; `number`: int64 [1], the step's in the ring.
    """

    peaks: torch.Tensor
    scores: torch.Tensor
    token_ids: torch.Tensor
    number: torch.Tensor

    @staticmethod
    def allocate(max_rows: int, vocabulary_size: int, device: torch.device) -> BlockResults:
        """Room for steps of a vocabulary on a device."""
        shape = (max_rows, -(-vocabulary_size // BLOCK_TOKENS))
        return BlockResults(
            peaks=torch.zeros(shape, dtype=torch.int32, device=device),
            scores=torch.zeros(shape, dtype=torch.float32, device=device),
            token_ids=torch.zeros(shape, dtype=torch.int32, device=device),
            number=torch.zeros(1, dtype=torch.int64, device=device),
        )


def sample_plain(logits: torch.Tensor, step: PlainSampling, *, is_greedy: bool) -> None:
    """Samples each row of `logits` ([R, V], float32 or of 16 bits, without filters and penalties) and ends the step.

    The ring gets -1 for rows whose largest logit is not finite, which disturb no other. A slot's last token changes where
    the row is sampled and finite. `is_greedy`: temperatures are not looked at.

    This is the reference, in torch's operations; it reads nothing back on a device.
    """
    num_rows = logits.shape[0]
    row_slots = step.row_slots[:num_rows]
    positions = step.context_lens[:num_rows].to(torch.int64)
    logits = logits.float()
    peaks = row_peaks(logits)
    is_finite = torch.isfinite(peaks)
    logits = torch.where(is_finite.unsqueeze(1), logits, 0.0)
    if is_greedy:
        token_ids = sample_greedy(logits)
    else:
        nothing = torch.zeros_like(positions)
        sampling = RowSampling(
            temperature=step.temperature[row_slots],
            top_k=nothing,
            top_p=nothing + 1.0,
            min_p=nothing + 0.0,
            seeds=step.seeds[row_slots],
            positions=positions,
        )
        token_ids = sample_gumbel(logits, sampling)
    is_taken = is_finite & (step.is_sampled[:num_rows] != 0)
    last_tokens = torch.where(is_taken, token_ids, step.last_tokens[row_slots])
    step.last_tokens.index_copy_(0, row_slots, last_tokens)
    values = step.values[:, :num_rows]
    values[0].copy_(peaks)
    write_ring(step.ring_ids, step.ring_values, step.counter, torch.where(is_finite, token_ids, -1), values)


def sample_plain_triton(logits: torch.Tensor, step: PlainSampling, blocks: BlockResults, *, is_greedy: bool) -> None:
    """`sample_plain` in two kernels, without allocating or waiting. `blocks` is for this vocabulary and R rows or more.

    Rows of `logits` may be apart by more than V, but by as much in every step. With tensors on a device the ring is pinned
    memory of the host. Raises ValueError when `blocks` has another shape, and where logits do not begin at a multiple of 16
    bytes, as all that torch allocates does: for others another variant would be compiled.
    """
    num_rows, vocabulary_size = logits.shape
    num_blocks = -(-vocabulary_size // BLOCK_TOKENS)
    max_rows = step.ring_values.shape[2]
    if blocks.peaks.shape[0] < num_rows or blocks.peaks.shape[1] != num_blocks:
        raise ValueError(
            f"room for {tuple(blocks.peaks.shape)} rows and blocks where there are {(num_rows, num_blocks)} of them"
        )
    if logits.stride(1) != 1 or logits.data_ptr() % 16:
        raise ValueError("logits must have dense rows and begin at a multiple of 16 bytes")
    found = {
        "peaks": blocks.peaks,
        "scores": blocks.scores,
        "token_ids": blocks.token_ids,
        "number": blocks.number,
        "row_slots": step.row_slots,
    }
    launch(
        _blocks_kernel,
        (num_blocks, num_rows),
        {
            **found,
            "logits": logits,
            "context_lens": step.context_lens,
            "temperature": step.temperature,
            "seeds": step.seeds,
            "counter": step.counter,
        },
        {
            "row_stride": logits.stride(0),
            "TEMPERATURE_STRIDE": step.temperature.stride(0),
            "SEEDS_STRIDE": step.seeds.stride(0),
            "VOCABULARY": vocabulary_size,
            "NUM_BLOCKS": num_blocks,
            "IS_GREEDY": is_greedy,
            "BLOCK": BLOCK_TOKENS,
            "num_warps": _BLOCK_WARPS,
            "enable_fp_fusion": False,  # torch rounds each product and each sum
        },
    )
    padded_blocks = next_power_of_two(num_blocks)
    launch(
        _finish_kernel,
        (num_rows,),
        {
            **found,
            "is_sampled": step.is_sampled,
            "last_tokens": step.last_tokens,
            "values": step.values,
            "ring_ids": step.ring_ids,
            "ring_values": step.ring_values,
        },
        {
            "VALUES_STRIDE": step.values.stride(0),
            "MAX_ROWS": max_rows,
            "DEPTH": len(step.ring_ids),
            "NUM_BLOCKS": num_blocks,
            "PADDED_BLOCKS": padded_blocks,
            "num_warps": min(max(padded_blocks // 64, 1), 8),
        },
    )


@triton.jit  # type: ignore[untyped-decorator]
def _row_key(lane: tl.constexpr, low: tl.tensor, high: tl.tensor, position: tl.tensor) -> tl.tensor:
    """One of `row_keys`, from uint32 words: uint32."""
    key = tl.full([], lane, tl.uint32)
    for index in tl.static_range(3):
        word = low if index == 0 else (high if index == 1 else position)
        key = key * 5 + 0xE6546B64 + word * 0xCC9E2D51
        key = (key ^ (key >> 16)) * 0x85EBCA6B
        key = (key ^ (key >> 13)) * 0xC2B2AE35
        key = key ^ (key >> 16)
    return key


@triton.jit  # type: ignore[untyped-decorator]
def row_noise(token_ids: tl.tensor, low_seed: tl.tensor, high_seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """`gumbel_noise` of tokens (int32) of one row, whose seed and position are uint32 words: float32."""
    high = token_ids.to(tl.uint32) * 0x9E3779B1 + _row_key(0x243F6A88, low_seed, high_seed, position)
    high = (high ^ (high >> 16)) * 0x85EBCA6B
    low = (high ^ _row_key(0x13198A2E, low_seed, high_seed, position)) * 0x27D4EB2F
    fraction = low.to(tl.int32, bitcast=True).to(tl.float32) * (2.0**-32 * (1 - 2.0**-20)) + 0.5
    high = high ^ _row_key(0x85A308D3, low_seed, high_seed, position)
    high = (high ^ (high >> 13)) * 0xC2B2AE35
    high = high ^ (high >> 16)
    uniform = (fraction + high.to(tl.int32, bitcast=True).to(tl.float32)) * (2.0**-32)
    uniform = tl.minimum(uniform - tl.floor(uniform), 1 - 2.0**-24)
    return -libdevice.log(-libdevice.log1p(-uniform))


@triton.jit  # type: ignore[untyped-decorator]
def _ordered(number: tl.tensor) -> tl.tensor:
    """Integers (int32) in the order of float32 numbers, with the largest for NaN: their maximum is NaN where any number is."""
    bits = number.to(tl.int32, bitcast=True)
    return tl.where(number == number, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _from_ordered(bits: tl.tensor) -> tl.tensor:
    """The float32 number of `_ordered`."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit(
    unaligned=("row_slots", "context_lens", "temperature", "seeds", "counter", "peaks", "scores", "token_ids", "number")
)
def _blocks_kernel(
    logits: tl.tensor,
    row_stride: tl.tensor,
    row_slots: tl.tensor,
    context_lens: tl.tensor,
    temperature: tl.tensor,
    seeds: tl.tensor,
    counter: tl.tensor,
    peaks: tl.tensor,
    scores: tl.tensor,
    token_ids: tl.tensor,
    number: tl.tensor,
    TEMPERATURE_STRIDE: tl.constexpr,
    SEEDS_STRIDE: tl.constexpr,
    VOCABULARY: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a block of the vocabulary and row. The first also counts the step, for programs that come after all these."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if (block == 0) & (row == 0):
        step_number = tl.load(counter)
        tl.store(number, step_number)
        tl.store(counter, step_number + 1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(logits + row * row_stride + token, mask=token < VOCABULARY, other=float("-inf")).to(tl.float32)
    score = found  # where a logit is NaN the row gives no token: what its scores become does not matter
    if not IS_GREEDY:
        # The noise is made while the logits are on their way.
        slot = tl.load(row_slots + row)
        divisor = tl.load(temperature + slot * TEMPERATURE_STRIDE)
        low = tl.load(seeds + slot * SEEDS_STRIDE).to(tl.uint32)
        high = tl.load(seeds + slot * SEEDS_STRIDE + 1).to(tl.uint32)
        position = tl.load(context_lens + row).to(tl.uint32)
        noise = tl.zeros([BLOCK], tl.float32)
        if divisor != 0.0:
            noise = row_noise(token, low, high, position)
        else:
            divisor = 1.0
        score = tl.div_rn(found, divisor) + noise
    peak = tl.max(_ordered(found), axis=0)
    # What stands behind the vocabulary has the least score there is, and a place after all tokens.
    best, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    place = row * NUM_BLOCKS + block
    tl.store(peaks + place, peak)
    tl.store(scores + place, best)
    tl.store(token_ids + place, block * BLOCK + index)


@jit(
    unaligned=(
        "peaks",
        "scores",
        "token_ids",
        "number",
        "row_slots",
        "is_sampled",
        "last_tokens",
        "values",
        "ring_ids",
        "ring_values",
    )
)
def _finish_kernel(
    peaks: tl.tensor,
    scores: tl.tensor,
    token_ids: tl.tensor,
    number: tl.tensor,
    row_slots: tl.tensor,
    is_sampled: tl.tensor,
    last_tokens: tl.tensor,
    values: tl.tensor,
    ring_ids: tl.tensor,
    ring_values: tl.tensor,
    VALUES_STRIDE: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
) -> None:
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    step_number = tl.load(number)
    slot = tl.load(row_slots + row)
    wants_token = tl.load(is_sampled + row) != 0
    block = tl.arange(0, PADDED_BLOCKS)
    is_block = block < NUM_BLOCKS
    place = row * NUM_BLOCKS + block
    ordered = tl.load(peaks + place, mask=is_block, other=-0x7FFFFFFF)
    score = tl.load(scores + place, mask=is_block, other=float("-inf"))
    token = tl.load(token_ids + place, mask=is_block, other=0)
    peak = _from_ordered(tl.max(ordered, axis=0))
    is_finite = tl.abs(peak) < float("inf")  # which a NaN is not
    index = tl.argmax(score, axis=0, tie_break_left=True)
    best = tl.sum(tl.where(block == index, token, 0), axis=0).to(tl.int64)

    tl.store(last_tokens + slot, best, mask=is_finite & wants_token)
    tl.store(values + row, peak)
    ring_place = step_number % DEPTH
    tl.store(ring_ids + ring_place * (MAX_ROWS + 1) + 1 + row, tl.where(is_finite, best, -1))
    tl.store(ring_values + ring_place * (2 * MAX_ROWS) + row, peak)
    tl.store(ring_values + (ring_place * 2 + 1) * MAX_ROWS + row, tl.load(values + VALUES_STRIDE + row))
    if row == 0:
        tl.store(ring_ids + ring_place * (MAX_ROWS + 1), step_number)
