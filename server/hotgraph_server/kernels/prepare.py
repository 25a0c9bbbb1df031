"""Makes a step's model inputs out of what the host knows (rows, starts, prompt tokens) and what only the device knows (tokens).

No value is read back, and nothing but the sizes of the tensors comes from the host.
"""

from __future__ import annotations

import torch

LAST_TOKEN = -1
"""Stands in `given_ids` for the token that the row's slot sampled last."""


def prepare_step(
    *,
    given_ids: torch.Tensor,
    row_slots: torch.Tensor,
    row_starts: torch.Tensor,
    row_offsets: torch.Tensor,
    last_tokens: torch.Tensor,
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

    In: `given_ids` int64 [T]; `row_slots` and `row_starts` (the position of the row's first token) int64 [R]; `row_offsets`
    int64 [R + 1], where rows start in T; `last_tokens` int64 [S]; `slot_block_tables` int32 [S, max_blocks]. Padding rows have
    start 0 and no tokens. Tokens past row_offsets[R] are padding: given as 0, they stand at position 0 and are written to the
    first place of the scratch block.
    """
    num_rows = row_slots.shape[0]
    index = torch.arange(given_ids.shape[0], device=given_ids.device)
    starts, ends = row_offsets[:-1], row_offsets[1:]
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
