"""Makes a step's model inputs out of what the host knows (rows, starts, prompt tokens) and what only the device knows (tokens,
lengths).

No value is read back, and nothing but the sizes of the tensors comes from the host. On the CPU this is plain torch, which is
the reference; on a GPU one Triton kernel does the same.
"""

from __future__ import annotations

import torch

from hotgraph_server.kernels.jit import jit, tl

LAST_TOKEN = -1
"""Stands in `given_ids` for the token that the row's slot sampled last."""

FROM_SLOT = -1
"""Stands in `row_starts` for the number of tokens that the row's slot has in the cache."""


def prepare_step(
    *,
    given_ids: torch.Tensor,
    row_slots: torch.Tensor,
    row_starts: torch.Tensor,
    row_offsets: torch.Tensor,
    last_tokens: torch.Tensor,
    slot_lens: torch.Tensor | None = None,
    slot_block_tables: torch.Tensor,
    block_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    last_indices: torch.Tensor,
) -> None:
    """Writes the last seven arguments, which are those of models.interface.StepTensors, from the others.

    In: `given_ids` int64 [T]; `row_slots` and `row_starts` (the position of the row's first token, or FROM_SLOT) int64 [R];
    `row_offsets` int64 [R + 1], where rows start in T; `last_tokens` and `slot_lens` (tokens in the cache; needed for
    FROM_SLOT only) int64 [S]; `slot_block_tables` int32 [S, max_blocks]. Padding rows have start 0 and no tokens. Tokens past
    row_offsets[R] are padding: given as 0, they stand at position 0 and are written to the first place of the scratch block.
    """
    if given_ids.is_cuda:
        prepare_step_triton(
            given_ids=given_ids,
            row_slots=row_slots,
            row_starts=row_starts,
            row_offsets=row_offsets,
            last_tokens=last_tokens,
            slot_lens=slot_lens,
            slot_block_tables=slot_block_tables,
            block_size=block_size,
            token_ids=token_ids,
            positions=positions,
            kv_indices=kv_indices,
            block_tables=block_tables,
            context_lens=context_lens,
            query_starts=query_starts,
            last_indices=last_indices,
        )
        return
    num_rows = row_slots.shape[0]
    index = torch.arange(given_ids.shape[0], device=given_ids.device)
    starts, ends = row_offsets[:-1], row_offsets[1:]
    if slot_lens is not None:
        row_starts = torch.where(row_starts == FROM_SLOT, slot_lens.index_select(0, row_slots), row_starts)
    row_of_token = torch.searchsorted(ends, index, right=True).clamp_(max=num_rows - 1)
    slot_of_token = row_slots.index_select(0, row_of_token)
    is_padding = index >= ends[-1]

    last_ids = last_tokens.index_select(0, slot_of_token)
    torch.where(given_ids == LAST_TOKEN, last_ids, given_ids, out=token_ids)

    torch.add((row_starts - starts).index_select(0, row_of_token), index, out=positions)
    positions.masked_fill_(is_padding, 0)

    entry = positions.div(block_size, rounding_mode="floor").add_(slot_of_token, alpha=slot_block_tables.shape[1])
    block = slot_block_tables.view(-1).index_select(0, entry)
    torch.remainder(positions, block_size, out=kv_indices)
    kv_indices.add_(block, alpha=block_size).masked_fill_(is_padding, 0)

    torch.index_select(slot_block_tables, 0, row_slots, out=block_tables)
    query_starts.copy_(row_offsets)
    context_lens.copy_((row_starts - starts).add_(ends))
    torch.sub(ends, 1, out=last_indices).clamp_(min=0)


def prepare_step_triton(
    *,
    given_ids: torch.Tensor,
    row_slots: torch.Tensor,
    row_starts: torch.Tensor,
    row_offsets: torch.Tensor,
    last_tokens: torch.Tensor,
    slot_lens: torch.Tensor | None = None,
    slot_block_tables: torch.Tensor,
    block_size: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    last_indices: torch.Tensor,
) -> None:
    """`prepare_step` in one kernel, for contiguous tensors."""
    num_tokens, num_rows = len(given_ids), len(row_slots)
    _prepare_kernel[(num_tokens + num_rows,)](
        given_ids,
        row_slots,
        row_starts,
        row_offsets,
        last_tokens,
        last_tokens if slot_lens is None else slot_lens,
        slot_block_tables,
        token_ids,
        positions,
        kv_indices,
        block_tables,
        context_lens,
        query_starts,
        last_indices,
        num_tokens,
        num_rows,
        has_slot_lens=slot_lens is not None,
        max_blocks=slot_block_tables.shape[1],
        block_size=block_size,
        last_token=LAST_TOKEN,
        from_slot=FROM_SLOT,
        num_warps=4,
    )


@jit(
    unspecialized=["num_tokens", "num_rows"],
    # Views of one array from the host: where each begins depends on the settings, and one number at a time is read of them.
    unaligned=["given_ids", "row_slots", "row_starts", "row_offsets"],
)
def _prepare_kernel(
    given_ids: tl.tensor,
    row_slots: tl.tensor,
    row_starts: tl.tensor,
    row_offsets: tl.tensor,
    last_tokens: tl.tensor,
    slot_lens: tl.tensor,
    slot_block_tables: tl.tensor,
    token_ids: tl.tensor,
    positions: tl.tensor,
    kv_indices: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    query_starts: tl.tensor,
    last_indices: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    has_slot_lens: tl.constexpr,
    max_blocks: tl.constexpr,
    block_size: tl.constexpr,
    last_token: tl.constexpr,
    from_slot: tl.constexpr,
) -> None:
    """One program a token, then one a row."""
    program = tl.program_id(0)
    is_token = program < num_tokens
    row = program - num_tokens
    if is_token:
        # The token's row is the number of rows that end before it or at it.
        row = 0
        first = 0
        while first < num_rows:
            other = first + tl.arange(0, 128)
            is_row = other < num_rows
            ends = tl.load(row_offsets + 1 + other, mask=is_row, other=0)
            row += tl.sum(((ends <= program) & is_row).to(tl.int32), axis=0)
            first += 128
    is_padding = row == num_rows
    row = tl.minimum(row, num_rows - 1)
    slot = tl.load(row_slots + row)
    start = tl.load(row_starts + row)
    if has_slot_lens:
        start = tl.where(start == from_slot, tl.load(slot_lens + slot), start)
    offset = tl.load(row_offsets + row)
    if is_token:
        given = tl.load(given_ids + program)
        tl.store(token_ids + program, tl.where(given == last_token, tl.load(last_tokens + slot), given))
        position = tl.where(is_padding, 0, start + program - offset)
        tl.store(positions + program, position)
        block = tl.load(slot_block_tables + slot * max_blocks + position // block_size).to(tl.int64)
        tl.store(kv_indices + program, tl.where(is_padding, 0, block * block_size + position % block_size))
    else:
        end = tl.load(row_offsets + row + 1)
        if row == 0:
            tl.store(query_starts, offset.to(tl.int32))
        tl.store(query_starts + row + 1, end.to(tl.int32))
        tl.store(context_lens + row, (start + end - offset).to(tl.int32))
        tl.store(last_indices + row, tl.maximum(end - 1, 0))
        for first_block in tl.static_range(0, max_blocks, 1024):
            entry = first_block + tl.arange(0, 1024)
            is_entry = entry < max_blocks
            entries = tl.load(slot_block_tables + slot * max_blocks + entry, mask=is_entry)
            tl.store(block_tables + row.to(tl.int64) * max_blocks + entry, entries, mask=is_entry)
