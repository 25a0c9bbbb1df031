"""Tiles: the Triton kernel of attention for rows of several tokens, a tile of them a program.

In a step with rows of one token it passes over them. Names as in `attention_parts.py`.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.attention_parts import VARIABLE, attend_dots, finish, store

_ROWS_AT_ONCE = tl.constexpr(64)  # rows looked at together when a tile looks for its row


@triton.jit(do_not_specialize=VARIABLE)  # type: ignore[untyped-decorator]
def tile_kernel(
    out: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    sinks: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    query_starts: tl.tensor,
    is_mixed: tl.tensor,
    num_rows: tl.tensor,
    num_tokens: tl.tensor,
    table_stride: tl.tensor,
    query_stride: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    block_heads: tl.constexpr,
    head_blocks: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    padded_key_dim: tl.constexpr,
    padded_value_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
    tile_keys: tl.constexpr,
) -> None:
    """Tiles of tile_tokens tokens with block_heads query heads each, grid (T // tile_tokens + R + 1, KV heads * head_blocks).

    Row i's tiles start at number query_starts[i] // tile_tokens + i: the host need not know how many each row has, and some
    have nothing to do. What lies after the last row, padding tokens, is as a row R that sees nothing and gives 0.
    With `is_mixed`, rows that `decode_kernel` serves are left to it.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1) // head_blocks
    first_head = tl.program_id(1) % head_blocks * block_heads
    num_before = 0
    for first in tl.range(0, num_rows + 1, _ROWS_AT_ONCE):
        rows = first + tl.arange(0, _ROWS_AT_ONCE)
        is_row = rows <= num_rows
        starts = tl.load(query_starts + rows, mask=is_row, other=0)
        num_before += tl.sum((is_row & (starts // tile_tokens + rows <= tile)).to(tl.int32), axis=0)
    row = num_before - 1
    is_real = row < num_rows
    query_start = tl.load(query_starts + row)
    query_end = tl.load(query_starts + row + 1, mask=is_real, other=0)
    context_len = tl.load(context_lens + row, mask=is_real, other=0)
    if (is_mixed != 0) & is_real & (query_start == row) & (query_end == row + 1):
        return
    query_end = tl.where(is_real, query_end, num_tokens)
    first_token = query_start + (tile - query_start // tile_tokens - row) * tile_tokens
    if first_token >= query_end:
        return

    local = tl.arange(0, tile_rows)
    tokens = first_token + local // block_heads
    group_heads = first_head + local % block_heads
    heads = kv_head * group + group_heads
    is_asked = (local < tile_tokens * block_heads) & (tokens < query_end) & (group_heads < group)
    # The position of a token less its number: what the cache holds of the row before this step, less where the row starts.
    shift = context_len - query_end
    lower = tl.maximum(shift + first_token + 1 - window, 0)
    upper = tl.where(is_real, shift + tl.minimum(first_token + tile_tokens, query_end), 0)
    key_dims = tl.arange(0, padded_key_dim)
    asked = tl.load(
        query + tokens[:, None].to(tl.int64) * query_stride + heads[:, None] * key_dim + key_dims[None, :],
        mask=is_asked[:, None] & (key_dims < key_dim)[None, :],
        other=0.0,
    )
    maximum, total, summed = attend_dots(
        asked,
        shift + tokens,
        keys + kv_head * key_dim,
        values + kv_head * value_dim,
        block_tables + row * table_stride,
        lower,
        upper,
        window,
        scaling,
        softcap,
        num_kv_heads,
        key_dim,
        value_dim,
        padded_key_dim,
        padded_value_dim,
        block_size,
        tile_keys,
        tile_rows,
    )
    result = finish(maximum, total, summed, sinks, heads, is_asked)
    places = tokens.to(tl.int64) * (num_kv_heads * group) + heads
    store(out, result, places, is_asked, tl.arange(0, padded_value_dim), value_dim)
