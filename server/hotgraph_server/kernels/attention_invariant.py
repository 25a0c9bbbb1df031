"""The Triton kernel of attention whose sums have one order for each token, whatever else there is in a step.

A share is `tile_keys` keys from a multiple of `tile_keys` on. What a share gives is worked out by itself, and the shares that a
token sees are added up from the first to the last. So a token's result depends on its query and on the keys and values up to
its position, and not on how many tokens its row has in this step, on the rows beside it, on padding, or on how many programs
share the work: a row of one token may have several, which leave what each of their shares gives, and the last one to end adds
all of it up. Sums that two places in it make are written as `fma`, so that no compiler joins a product and a sum here and not
there.

It is compiled for tiles of 64 rows, and for some models for tiles of 16 as well, which many rows of one token are served by
faster. Of both every 16 rows are one warp's, with the same numbers in the same lanes, and the tensor cores add up 16 columns in
the same way in their instructions for a warp (mma) and for four (wgmma). No manual promises that: tests on the GPU look.

With `PDL` it is a link of a chain as `attention_decode.py` says: before its wait it reads lengths and where rows start. Names
are those of `attention_parts.py`.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.attention_parts import finite, slots, store, to_scores, wait

_ROWS_AT_ONCE = tl.constexpr(64)  # rows looked at together when a tile looks for its row
_LOG2_E = tl.constexpr(1.4426950408889634)

VARIABLE = ["max_shares", "num_rows", "num_tokens", "served", "table_stride", "window"]
"""Sizes of the step, or of one layer: for no value of them there is a kernel of its own."""

ALL_ROWS, ROWS_OF_ONE, OTHER_ROWS = 0, 1, 2
"""Which rows a launch serves: those of one token, all others and padding, or all."""
_ROWS_OF_ONE = tl.constexpr(ROWS_OF_ONE)
_OTHER_ROWS = tl.constexpr(OTHER_ROWS)


@triton.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def _merged(
    maximum: tl.tensor,
    total: tl.tensor,
    summed: tl.tensor,
    share_maximum: tl.tensor,
    share_total: tl.tensor,
    share_summed: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The shares so far, and one more: maxima and totals [n], sums [n, dim]. One that saw nothing changes nothing."""
    highest = tl.maximum(maximum, share_maximum)
    top = finite(highest)
    factor = tl.exp2(maximum - top)
    share_factor = tl.exp2(share_maximum - top)
    total = tl.fma(share_total, share_factor, total * factor)
    summed = tl.fma(share_summed, tl.broadcast_to(share_factor[:, None], share_summed.shape), summed * factor[:, None])
    return highest, total, summed


@triton.jit  # type: ignore[untyped-decorator]
def _finished(
    maximum: tl.tensor, total: tl.tensor, summed: tl.tensor, sinks: tl.tensor, heads: tl.tensor, is_head: tl.tensor
) -> tl.tensor:
    """`attention_parts.finish`, with one rounding for each sum wherever it stands."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=is_head, other=0.0).to(tl.float32) * _LOG2_E
        top = finite(tl.maximum(maximum, sink))
        factor = tl.exp2(maximum - top)
        total = tl.fma(total, factor, tl.exp2(sink - top))
        summed = summed * factor[:, None]
    return summed / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=VARIABLE)  # type: ignore[untyped-decorator]
def invariant_kernel(
    out: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    sinks: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    query_starts: tl.tensor,
    sums: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    arrivals: tl.tensor,
    max_shares: tl.tensor,
    num_rows: tl.tensor,
    num_tokens: tl.tensor,
    served: tl.tensor,
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
    heads_at_once: tl.constexpr,
    shares_at_once: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Tiles of tile_tokens tokens with block_heads query heads, grid (T // tile_tokens + R + 1, KV heads * head_blocks, parts).

    Tiles are numbered as in `tile_kernel`. Of a row of one token the parts have a stretch of the shares each; of other tiles
    the first part does everything. served: which rows, see above. `sums`, `maxima`, `totals`: as in
    `attention_rows.Scratch`, of max_shares shares, not touched where there is one part.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1) // head_blocks
    first_head = tl.program_id(1) % head_blocks * block_heads
    part = tl.program_id(2)
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
    if PDL:
        wait()
    is_one = is_real & (query_end == query_start + 1)
    if (is_one & (served == _OTHER_ROWS)) | ((is_one == 0) & (served == _ROWS_OF_ONE)):
        return
    query_end = tl.where(is_real, query_end, num_tokens)
    first_token = query_start + (tile - query_start // tile_tokens - row) * tile_tokens
    if first_token >= query_end:
        return

    # The position of a token less its number: what the cache holds of the row before this step, less where the row starts.
    shift = context_len - query_end
    upper = tl.where(is_real, shift + tl.minimum(first_token + tile_tokens, query_end), 0)
    first_share = tl.maximum(shift + first_token + 1 - window, 0) // tile_keys
    num_shares = tl.maximum(tl.cdiv(upper, tile_keys) - first_share, 0)
    num_parts = tl.where(is_one, tl.num_programs(2), 1)
    part_shares = tl.maximum(tl.cdiv(num_shares, num_parts), 1)
    num_used = tl.maximum(tl.cdiv(num_shares, part_shares), 1)
    if part >= num_used:
        return
    is_split = num_used > 1

    local = tl.arange(0, tile_rows)
    tokens = first_token + local // block_heads
    group_heads = first_head + local % block_heads
    num_heads: tl.constexpr = num_kv_heads * group
    heads = kv_head * group + group_heads
    is_asked = (local < tile_tokens * block_heads) & (tokens < query_end) & (group_heads < group)
    key_dims = tl.arange(0, padded_key_dim)
    value_dims = tl.arange(0, padded_value_dim)
    is_value = value_dims < value_dim
    steps = tl.arange(0, tile_keys)
    asked = tl.load(
        query + tokens[:, None].to(tl.int64) * query_stride + heads[:, None] * key_dim + key_dims[None, :],
        mask=is_asked[:, None] & (key_dims < key_dim)[None, :],
        other=0.0,
    )
    query_positions = shift + tokens
    keys += kv_head * key_dim
    values += kv_head * value_dim
    table = block_tables + row * table_stride
    # Of a row of one token the first block_heads rows of the tile are all there are.
    places = (row * num_heads + heads) * max_shares
    is_left = is_asked & is_split
    maximum = tl.full([tile_rows], float("-inf"), tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    summed = tl.zeros([tile_rows, padded_value_dim], tl.float32)
    for share in tl.range(part * part_shares, tl.minimum((part + 1) * part_shares, num_shares)):
        positions = (first_share + share) * tile_keys + steps
        is_there = positions < upper
        lines = (slots(table, positions, is_there, block_size) * num_kv_heads)[:, None]
        key = tl.load(
            keys + lines * key_dim + key_dims[None, :],
            mask=is_there[:, None] & (key_dims < key_dim)[None, :],
            other=0.0,
        )
        value = tl.load(
            values + lines * value_dim + value_dims[None, :],
            mask=is_there[:, None] & is_value[None, :],
            other=0.0,
        )
        # How far back a key lies; in the future it is beyond any window, as it wraps around.
        distances = (query_positions[:, None] - positions[None, :]).to(tl.uint32)
        is_seen = (distances < window.to(tl.uint32)) & is_there[None, :]
        scores = to_scores(tl.dot(asked, tl.trans(key), input_precision="ieee"), scaling, softcap)
        scores = tl.where(is_seen, scores, float("-inf"))
        share_maximum = tl.max(scores, axis=1)
        weights = tl.exp2(scores - finite(share_maximum)[:, None])
        share_total = tl.sum(weights, axis=1)
        share_summed = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        tl.store(maxima + places + share, share_maximum, mask=is_left)
        tl.store(totals + places + share, share_total, mask=is_left)
        tl.store(
            sums + (places + share)[:, None] * value_dim + value_dims[None, :],
            share_summed,
            mask=is_left[:, None] & is_value[None, :],
        )
        maximum, total, summed = _merged(maximum, total, summed, share_maximum, share_total, share_summed)

    if not is_split:
        result = _finished(maximum, total, summed, sinks, heads, is_asked)
        store(out, result, tokens.to(tl.int64) * num_heads + heads, is_asked, value_dims, value_dim)
    else:
        # All threads have stored before one of them tells so.
        tl.debug_barrier()
        arrival = arrivals + row * num_heads + tl.program_id(1)
        if tl.atomic_add(arrival, 1, sem="acq_rel") == num_used - 1:
            # The next layer counts from 0 again.
            tl.store(arrival, 0)
            for base in tl.range(0, block_heads, heads_at_once):
                one = base + tl.arange(0, heads_at_once)
                is_some = (one < block_heads) & (first_head + one < group)
                some = kv_head * group + first_head + one
                some_places = (row * num_heads + some) * max_shares
                maximum_of_all = tl.full([heads_at_once], float("-inf"), tl.float32)
                total_of_all = tl.zeros([heads_at_once], tl.float32)
                sum_of_all = tl.zeros([heads_at_once, padded_value_dim], tl.float32)
                for first in tl.range(0, num_shares, shares_at_once, num_stages=1):
                    # Loads of several shares are on their way together; their sums are made one after the other.
                    found: tl.tuple = ()
                    for offset in tl.static_range(shares_at_once):
                        is_share = is_some & (first + offset < num_shares)
                        spot = some_places + first + offset
                        # Past the cache of this multiprocessor, which may hold what stood there before.
                        found = found + (  # noqa: RUF005  # Triton knows no unpacking
                            tl.load(maxima + spot, mask=is_share, other=float("-inf"), cache_modifier=".cg"),
                            tl.load(totals + spot, mask=is_share, other=0.0, cache_modifier=".cg"),
                            tl.load(
                                sums + spot[:, None] * value_dim + value_dims[None, :],
                                mask=is_share[:, None] & is_value[None, :],
                                other=0.0,
                                cache_modifier=".cg",
                            ),
                        )
                    for offset in tl.static_range(shares_at_once):
                        maximum_of_all, total_of_all, sum_of_all = _merged(
                            maximum_of_all,
                            total_of_all,
                            sum_of_all,
                            found[3 * offset],
                            found[3 * offset + 1],
                            found[3 * offset + 2],
                        )
                result = _finished(maximum_of_all, total_of_all, sum_of_all, sinks, some, is_some)
                store(out, result, query_start.to(tl.int64) * num_heads + some, is_some, value_dims, value_dim)
