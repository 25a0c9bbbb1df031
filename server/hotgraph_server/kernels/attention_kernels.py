"""The Triton kernels of attention over the paged cache; `attention_triton.py` launches them.

*Decode* serves rows of one token: each row's keys are split among programs, and the last of them to finish adds up what all
have found, in the order of the splits. *Tiles* serves longer rows, a tile of tokens a program. In a step with both, each
kernel passes over the other's rows.

Names: R rows, T tokens; a group is the query heads that share a KV head, of which a program serves `block_heads`; a padded
size is a power of two. What is marked tl.constexpr follows from the model and from tables of the launch, never from a step.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

_SPLIT_UNIT = tl.constexpr(16)  # keys; a split's share is a multiple of it
_ROWS_AT_ONCE = tl.constexpr(64)  # rows looked at together when a tile looks for its row
_LOG2_E = tl.constexpr(1.4426950408889634)

# Sizes of the step and what may differ from layer to layer: a kernel made for one value of them would have to be compiled for
# the next one, maybe inside a capture.
_VARIABLE = ["is_mixed", "num_rows", "num_tokens", "table_stride", "window"]


@triton.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def _scores(products: tl.tensor, scaling: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """Scores to base 2: weights are 2**score. tanh is made of the exponential, which may overflow to the right result."""
    if softcap is not None:
        capped = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(products * (scaling / softcap * 2.0 * _LOG2_E))))
        return capped * _LOG2_E
    else:  # noqa: RET505  # Triton wants the branch that it does not take out of its sight
        return products * (scaling * _LOG2_E)


@triton.jit  # type: ignore[untyped-decorator]
def _finite(maximum: tl.tensor) -> tl.tensor:
    """What to subtract from scores: 0 where nothing was seen yet, as infinities cannot be subtracted."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(
    maximum: tl.tensor, total: tl.tensor, summed: tl.tensor, sinks: tl.tensor, heads: tl.tensor, is_head: tl.tensor
) -> tl.tensor:
    """The weighted mean, [n, dim], of n heads; 0 where nothing was seen. A sink takes weight and gives no value."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=is_head, other=0.0).to(tl.float32) * _LOG2_E
        top = _finite(tl.maximum(maximum, sink))
        factor = tl.exp2(maximum - top)
        total = total * factor + tl.exp2(sink - top)
        summed = summed * factor[:, None]
    return summed / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    out: tl.tensor,
    result: tl.tensor,
    places: tl.tensor,
    is_place: tl.tensor,
    value_dims: tl.tensor,
    value_dim: tl.constexpr,
) -> None:
    """Rows of `result` to rows of `out`, in its dtype."""
    mask = is_place[:, None] & (value_dims < value_dim)[None, :]
    tl.store(out + places[:, None] * value_dim + value_dims[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _slots(table: tl.tensor, positions: tl.tensor, is_seen: tl.tensor, block_size: tl.constexpr) -> tl.tensor:
    """Where a row's positions stand in the cache: block * block size + offset, int64 as caches are large."""
    blocks = tl.load(table + positions // block_size, mask=is_seen, other=0).to(tl.int64)
    return blocks * block_size + positions % block_size


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
    places = (_slots(table, positions, is_seen, block_size) * num_kv_heads)[:, :, None]
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
        scores = _scores(tl.sum(key.to(tl.float32) * asked[None, None, :], axis=2), scaling, softcap)
        scores = tl.where(first + steps < upper, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        top = _finite(new_maximum)
        factor = tl.exp2(maximum - top)
        weights = tl.exp2(scores - top[:, None])
        total = total * factor + tl.sum(weights, axis=1)
        summed = summed * factor[:, None] + tl.sum(weights[:, :, None] * value.to(tl.float32), axis=1)
        maximum = new_maximum
        key, value = next_key, next_value
    highest = tl.max(maximum, axis=0, keep_dims=True)
    factor = tl.exp2(maximum - _finite(highest))
    return (
        highest,
        tl.sum(total * factor, axis=0, keep_dims=True),
        tl.sum(summed * factor[:, None], axis=0, keep_dims=True),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _attend_dots(
    asked: tl.tensor,
    query_positions: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    window: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    num_kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    padded_key_dim: tl.constexpr,
    padded_value_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_keys: tl.constexpr,
    tile_rows: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Queries [tile_rows, dim] at their positions over the keys from `lower` to `upper`, each over what it sees of them.

    Gives the maximum and total of each, and its sum [tile_rows, dim].
    Source: Dao, "FlashAttention-2", 2023.
    """
    key_dims = tl.arange(0, padded_key_dim)
    value_dims = tl.arange(0, padded_value_dim)
    steps = tl.arange(0, tile_keys)
    maximum = tl.full([tile_rows], float("-inf"), tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    summed = tl.zeros([tile_rows, padded_value_dim], tl.float32)
    for first in tl.range(lower, upper, tile_keys):
        positions = first + steps
        is_there = positions < upper
        places = (_slots(table, positions, is_there, block_size) * num_kv_heads)[:, None]
        key = tl.load(
            keys + places * key_dim + key_dims[None, :],
            mask=is_there[:, None] & (key_dims < key_dim)[None, :],
            other=0.0,
        )
        value = tl.load(
            values + places * value_dim + value_dims[None, :],
            mask=is_there[:, None] & (value_dims < value_dim)[None, :],
            other=0.0,
        )
        # Products of float32 in full: the default, TF32, keeps ten bits.
        scores = _scores(tl.dot(asked, tl.trans(key), input_precision="ieee"), scaling, softcap)
        # How far back a key lies; in the future it is beyond any window, as it wraps around.
        distances = (query_positions[:, None] - positions[None, :]).to(tl.uint32)
        scores = tl.where((distances < window.to(tl.uint32)) & is_there[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        top = _finite(new_maximum)
        factor = tl.exp2(maximum - top)
        weights = tl.exp2(scores - top[:, None])
        total = total * factor + tl.sum(weights, axis=1)
        summed = tl.dot(weights.to(value.dtype), value, acc=summed * factor[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, summed


@triton.jit(do_not_specialize=_VARIABLE)  # type: ignore[untyped-decorator]
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
) -> None:
    """Rows whose token is their only one, grid (R, KV heads * head_blocks, splits). Row i's token is token i.

    With `is_mixed`, rows of which that is not true are left to `tile_kernel`. Padding rows give 0.
    Source of the splitting: Dao et al., "Flash-Decoding for long-context inference", 2023.
    """
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
        maximum, total, summed = _attend_dots(
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
        result = _finish(maximum, total, summed, sinks, heads, is_head)
        _store(out, result, heads, is_head, value_dims, value_dim)
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
                factor = tl.exp2(part_maximum - _finite(highest)[:, None])
                all_total = tl.sum(part_total * factor, axis=1)
                all_summed = tl.sum(part_summed * factor[:, :, None], axis=1)
                result = _finish(highest, all_total, all_summed, sinks, some, is_some)
                _store(out, result, some, is_some, value_dims, value_dim)


@triton.jit(do_not_specialize=_VARIABLE)  # type: ignore[untyped-decorator]
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
    maximum, total, summed = _attend_dots(
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
    result = _finish(maximum, total, summed, sinks, heads, is_asked)
    places = tokens.to(tl.int64) * (num_kv_heads * group) + heads
    _store(out, result, places, is_asked, tl.arange(0, padded_value_dim), value_dim)
