"""Decode: the Triton kernel of attention for rows of one token.

Each row's keys are split among programs, and the last of them to finish adds up what all have found, in the order of the
splits. In a step with longer rows it passes over them. Names as in `attention_parts.py`.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.attention_parts import VARIABLE, attend_dots, finish, finite, slots, store, to_scores

_SPLIT_UNIT = tl.constexpr(16)  # keys; a split's share is a multiple of it


@triton.jit  # type: ignore[untyped-decorator]
def _load_lanes(
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    positions: tl.tensor,
    upper: tl.tensor,
    num_kv_heads: tl.constexpr,
    key_dims: tl.tensor,
    value_dims: tl.tensor,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    block_size: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Keys and values at positions [lanes, n]: [lanes, n, padded dim], 0 from `upper` on and in the padding."""
    is_seen = positions < upper
    places = (slots(table, positions, is_seen, block_size) * num_kv_heads)[:, :, None]
    is_seen = is_seen[:, :, None]
    key_mask = is_seen & (key_dims < key_dim)[None, None, :]
    key = tl.load(keys + places * key_dim + key_dims[None, None, :], mask=key_mask, other=0.0)
    value_mask = is_seen & (value_dims < value_dim)[None, None, :]
    value = tl.load(values + places * value_dim + value_dims[None, None, :], mask=value_mask, other=0.0)
    return key, value


@triton.jit  # type: ignore[untyped-decorator]
def _attend_lanes(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    num_kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    padded_key_dim: tl.constexpr,
    padded_value_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_keys: tl.constexpr,
    lanes: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One query head over the keys from `lower` to `upper`: maximum [1], total [1], sum [1, dim].

    Each lane has a softmax of its own over every lanes-th key, and the lanes are put together once at the end: in between no
    thread waits for another but to add up a product over the dimension.
    """
    key_dims = tl.arange(0, padded_key_dim)
    value_dims = tl.arange(0, padded_value_dim)
    asked = tl.load(query + key_dims, mask=key_dims < key_dim, other=0.0).to(tl.float32)
    # Lanes come first: there Triton lays them over warps and threads, and a lane's own keys over registers.
    steps = tl.arange(0, lanes)[:, None] + tl.arange(0, tile_keys // lanes)[None, :] * lanes
    maximum = tl.full([lanes], float("-inf"), tl.float32)
    total = tl.zeros([lanes], tl.float32)
    summed = tl.zeros([lanes, padded_value_dim], tl.float32)
    # A tile is loaded while the one before is worked on. Loads left to stand before their use are moved among it by ptxas, and
    # then each waits for the one before.
    key, value = _load_lanes(
        keys, values, table, lower + steps, upper, num_kv_heads, key_dims, value_dims, key_dim, value_dim, block_size
    )
    for first in tl.range(lower, upper, tile_keys):
        next_key, next_value = _load_lanes(
            keys,
            values,
            table,
            first + tile_keys + steps,
            upper,
            num_kv_heads,
            key_dims,
            value_dims,
            key_dim,
            value_dim,
            block_size,
        )
        scores = to_scores(tl.sum(key.to(tl.float32) * asked[None, None, :], axis=2), scaling, softcap)
        scores = tl.where(first + steps < upper, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        top = finite(new_maximum)
        factor = tl.exp2(maximum - top)
        weights = tl.exp2(scores - top[:, None])
        total = total * factor + tl.sum(weights, axis=1)
        summed = summed * factor[:, None] + tl.sum(weights[:, :, None] * value.to(tl.float32), axis=1)
        maximum = new_maximum
        key, value = next_key, next_value
    highest = tl.max(maximum, axis=0, keep_dims=True)
    factor = tl.exp2(maximum - finite(highest))
    return (
        highest,
        tl.sum(total * factor, axis=0, keep_dims=True),
        tl.sum(summed * factor[:, None], axis=0, keep_dims=True),
    )


@triton.jit(do_not_specialize=VARIABLE)  # type: ignore[untyped-decorator]
def decode_kernel(
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
    is_mixed: tl.tensor,
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
    padded_heads: tl.constexpr,
    tile_keys: tl.constexpr,
    lanes: tl.constexpr,
    max_splits: tl.constexpr,
    heads_at_once: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Rows whose token is their only one, grid (R, KV heads * head_blocks, splits). Row i's token is token i.

    With `is_mixed`, rows of which that is not true are left to `tile_kernel`. Padding rows give 0.
    With `PDL` the kernel is a link of a chain, as those of `few_rows_kernels.py` are: every program waits, on all its ways out.
    Source of the splitting: Dao et al., "Flash-Decoding for long-context inference", 2023.
    """
    if PDL:
        # Lengths and tables, too, may have been written in this step, and the scratch may still be read by the layer before.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    kv_head = tl.program_id(1) // head_blocks
    first_head = tl.program_id(1) % head_blocks * block_heads
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    query_start = tl.load(query_starts + row)
    query_end = tl.load(query_starts + row + 1)
    context_len = tl.load(context_lens + row)
    if (is_mixed != 0) & ((query_start != row) | (query_end != row + 1)):
        return
    first_seen = tl.maximum(context_len - window, 0)
    num_seen = context_len - first_seen
    share = tl.maximum(tl.cdiv(tl.cdiv(num_seen, num_splits), _SPLIT_UNIT), 1) * _SPLIT_UNIT
    num_used = tl.maximum(tl.cdiv(num_seen, share), 1)
    if split >= num_used:
        return
    lower = first_seen + split * share
    upper = tl.minimum(lower + share, context_len)

    group_heads = first_head + tl.arange(0, padded_heads)
    is_head = (tl.arange(0, padded_heads) < block_heads) & (group_heads < group)
    heads = kv_head * group + group_heads
    query += row.to(tl.int64) * query_stride
    keys += kv_head * key_dim
    values += kv_head * value_dim
    table = block_tables + row * table_stride
    if padded_heads == 1:
        maximum, total, summed = _attend_lanes(
            query + kv_head * key_dim,
            keys,
            values,
            table,
            lower,
            upper,
            scaling,
            softcap,
            num_kv_heads,
            key_dim,
            value_dim,
            padded_key_dim,
            padded_value_dim,
            block_size,
            tile_keys,
            lanes,
        )
    else:
        key_dims = tl.arange(0, padded_key_dim)
        asked = tl.load(
            query + heads[:, None] * key_dim + key_dims[None, :],
            mask=is_head[:, None] & (key_dims < key_dim)[None, :],
            other=0.0,
        )
        query_positions = tl.zeros([padded_heads], tl.int32) + (context_len - 1)
        maximum, total, summed = attend_dots(
            asked,
            query_positions,
            keys,
            values,
            table,
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
            padded_heads,
        )

    value_dims = tl.arange(0, padded_value_dim)
    is_value = value_dims < value_dim
    num_heads = num_kv_heads * group
    out += row.to(tl.int64) * num_heads * value_dim
    if num_used == 1:
        result = finish(maximum, total, summed, sinks, heads, is_head)
        store(out, result, heads, is_head, value_dims, value_dim)
    elif sums is not None:  # with one split there is no such tensor, and nothing to compile here
        places = (row * num_heads + heads) * num_splits + split
        tl.store(
            sums + places[:, None] * value_dim + value_dims[None, :], summed, mask=is_head[:, None] & is_value[None, :]
        )
        tl.store(maxima + places, maximum, mask=is_head)
        tl.store(totals + places, total, mask=is_head)
        # All threads have stored before one of them tells so.
        tl.debug_barrier()
        arrival = arrivals + row * num_heads + tl.program_id(1)
        if tl.atomic_add(arrival, 1, sem="acq_rel") == num_used - 1:
            # The next layer counts from 0 again.
            tl.store(arrival, 0)
            splits = tl.arange(0, max_splits)
            for base in tl.range(0, block_heads, heads_at_once):
                local = base + tl.arange(0, heads_at_once)
                is_some = (local < block_heads) & (first_head + local < group)
                some = kv_head * group + first_head + local
                parts = (row * num_heads + some)[:, None] * num_splits + splits[None, :]
                is_part = is_some[:, None] & (splits < num_used)[None, :]
                # Past the cache of this multiprocessor, which may hold what stood there before.
                part_maximum = tl.load(maxima + parts, mask=is_part, other=float("-inf"), cache_modifier=".cg")
                part_total = tl.load(totals + parts, mask=is_part, other=0.0, cache_modifier=".cg")
                part_summed = tl.load(
                    sums + parts[:, :, None] * value_dim + value_dims[None, None, :],
                    mask=is_part[:, :, None] & is_value[None, None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                highest = tl.max(part_maximum, axis=1)
                factor = tl.exp2(part_maximum - finite(highest)[:, None])
                all_total = tl.sum(part_total * factor, axis=1)
                all_summed = tl.sum(part_summed * factor[:, :, None], axis=1)
                result = finish(highest, all_total, all_summed, sinks, some, is_some)
                store(out, result, some, is_some, value_dims, value_dim)
