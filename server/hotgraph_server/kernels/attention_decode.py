"""Decode: the Triton kernel of attention for rows of one token.

Each row's keys are split in shares, and the last program to finish one adds up what all have found, in the order of the
shares. Lengths are known to the device alone, so the grid has a few programs for each row, and some for whatever shares long
rows have beyond these. In a step with longer rows it passes over them. Names as in `attention_parts.py`.

With `PDL` it is a link of a chain, as the kernels of `few_rows_kernels.py` are, and may start while the kernel before, which
makes this layer's queries, keys and values, still runs. What is older is complete by then if that one lets it start only after
its own wait, or ends without letting anything start: then all before it have ended. So before its wait a program reads lengths,
tables, and keys and values of earlier steps, which is all but the position of the row's own token; it does not read queries,
nor does it write: the layer before may still read its result, and then its scratch, too, until the wait is over.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.attention_parts import VARIABLE, attend_dots, finish, finite, store, to_scores, weigh

_SHARE_UNIT = tl.constexpr(16)  # keys; a share is a multiple of it
_ROWS_AT_ONCE = tl.constexpr(64)  # rows looked at together when a share is looked for


@triton.jit  # type: ignore[untyped-decorator]
def _wait() -> None:
    """Returns when the kernel before has ended, and so have all before that; the one behind may start from here on."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def _uniform(number: tl.tensor) -> tl.tensor:
    """The number, which is the same in all threads, told to the compiler to be so: it then takes no register of each thread."""
    return tl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [number], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit  # type: ignore[untyped-decorator]
def _load_blocks(table: tl.tensor, positions: tl.tensor, upper: tl.tensor, block_size: tl.constexpr) -> tl.tensor:
    """The blocks of positions; 0 from `upper` on."""
    return tl.load(table + positions // block_size, mask=positions < upper, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _load_tile(
    keys: tl.tensor,
    values: tl.tensor,
    blocks: tl.tensor,
    positions: tl.tensor,
    upper: tl.tensor,
    num_kv_heads: tl.constexpr,
    key_size: tl.constexpr,
    value_size: tl.constexpr,
    padded_key_size: tl.constexpr,
    padded_value_size: tl.constexpr,
    block_size: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Keys and values at positions in blocks, both of any shape, [..., padded size], 0 from `upper` on and in the padding.

    Sizes are of what the pointers point at, words or numbers.
    """
    is_seen = tl.expand_dims(positions < upper, -1)
    places = tl.expand_dims((blocks.to(tl.int64) * block_size + positions % block_size) * num_kv_heads, -1)
    key_steps = tl.arange(0, padded_key_size)[None, :]
    value_steps = tl.arange(0, padded_value_size)[None, :]
    if len(positions.shape) == 2:
        key_steps = key_steps[None, :, :]
        value_steps = value_steps[None, :, :]
    key = tl.load(keys + places * key_size + key_steps, mask=is_seen & (key_steps < key_size), other=0)
    value = tl.load(values + places * value_size + value_steps, mask=is_seen & (value_steps < value_size), other=0)
    return key, value


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(words: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """What `_load_tile` loaded, as numbers: [..., n] words of two neighbours each are 2n, in order."""
    if words.dtype == dtype:
        return words
    else:  # noqa: RET505  # Triton wants the branch that it does not take out of its sight
        low = words.to(tl.int16).to(dtype, bitcast=True)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
        joined = tl.join(low, high)
        if len(words.shape) == 3:
            return tl.reshape(joined, (words.shape[0], words.shape[1], 2 * words.shape[2]))
        else:  # noqa: RET505  # as above
            return tl.reshape(joined, (words.shape[0], 2 * words.shape[1]))


@triton.jit  # type: ignore[untyped-decorator]
def _add_lanes(
    maximum: tl.tensor,
    total: tl.tensor,
    summed: tl.tensor,
    asked: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    positions: tl.tensor,
    upper: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A tile more: maximum and total [lanes] and sum [lanes, dim], with keys and values at positions [lanes, n]."""
    products = tl.sum(_numbers(key, dtype).to(tl.float32) * asked[:, None, :], axis=2)
    scores = tl.where(positions < upper, to_scores(products, scaling, softcap), float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    top = finite(new_maximum)
    factor = tl.exp2(maximum - top)
    weights = tl.exp2(scores - top[:, None])
    total = total * factor + tl.sum(weights, axis=1)
    summed = summed * factor[:, None] + tl.sum(weights[:, :, None] * _numbers(value, dtype).to(tl.float32), axis=1)
    return new_maximum, total, summed


@triton.jit  # type: ignore[untyped-decorator]
def _add_dots(
    maximum: tl.tensor,
    total: tl.tensor,
    summed: tl.tensor,
    asked: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    positions: tl.tensor,
    upper: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A tile more: maximum and total [heads] and sum [heads, dim], with keys and values at positions [n]."""
    is_seen = tl.expand_dims(positions < upper, 0)
    weights, maximum, total, factor = weigh(asked, _numbers(key, dtype), is_seen, maximum, total, scaling, softcap)
    summed = tl.dot(weights.to(dtype), _numbers(value, dtype), acc=summed * factor[:, None], input_precision="ieee")
    return maximum, total, summed


@triton.jit  # type: ignore[untyped-decorator]
def _attend_ahead(
    query: tl.tensor,
    heads: tl.tensor,
    is_head: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    own: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    num_kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    padded_key_dim: tl.constexpr,
    padded_value_dim: tl.constexpr,
    block_size: tl.constexpr,
    padded_heads: tl.constexpr,
    tile_keys: tl.constexpr,
    lanes: tl.constexpr,
    words: tl.constexpr,
    PDL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Query heads over the keys from `lower` to `upper`: maximum [n], total [n], sum [n, dim]. It waits for the kernel before.

    What stands before the position `own`, the token's, was written in earlier steps and is requested before the wait.

    With one head each lane has a softmax of its own over every lanes-th key, and the lanes are put together once at the end: in
    between no thread waits for another but to add up a product over the dimension.

    Two tiles are on their way at a time, in registers: while one is worked on the other is loaded, and of the next two it is
    known in which blocks they stand. Registers that a loop hands on must not be copied, as a copy waits for the load: so two
    tiles a turn, and 16-bit numbers as words, which else would be taken apart at once.
    """
    dtype: tl.constexpr = query.dtype.element_ty
    key_size: tl.constexpr = key_dim // words
    value_size: tl.constexpr = value_dim // words
    padded_key_size: tl.constexpr = padded_key_dim // words
    padded_value_size: tl.constexpr = padded_value_dim // words
    if padded_heads == 1:
        # Lanes come first: there Triton lays them over warps and threads, and a lane's own keys over registers.
        steps = tl.arange(0, lanes)[:, None] + tl.arange(0, tile_keys // lanes)[None, :] * lanes
    else:
        steps = tl.arange(0, tile_keys)
    second = lower + tile_keys
    third = second + tile_keys
    early = tl.minimum(upper, own)
    even_blocks = _load_blocks(table, lower + steps, upper, block_size)
    odd_blocks = _load_blocks(table, second + steps, upper, block_size)
    even_key, even_value = _load_tile(
        keys,
        values,
        even_blocks,
        lower + steps,
        early,
        num_kv_heads,
        key_size,
        value_size,
        padded_key_size,
        padded_value_size,
        block_size,
    )
    odd_key, odd_value = _load_tile(
        keys,
        values,
        odd_blocks,
        second + steps,
        early,
        num_kv_heads,
        key_size,
        value_size,
        padded_key_size,
        padded_value_size,
        block_size,
    )
    next_even_blocks = _load_blocks(table, third + steps, upper, block_size)
    next_odd_blocks = _load_blocks(table, third + tile_keys + steps, upper, block_size)
    if PDL:
        _wait()
    # One program a head has the token's own position. It loads that tile once more, which the cache still holds.
    if own < upper:
        if own < second:
            even_key, even_value = _load_tile(
                keys,
                values,
                even_blocks,
                lower + steps,
                upper,
                num_kv_heads,
                key_size,
                value_size,
                padded_key_size,
                padded_value_size,
                block_size,
            )
        elif own < third:
            odd_key, odd_value = _load_tile(
                keys,
                values,
                odd_blocks,
                second + steps,
                upper,
                num_kv_heads,
                key_size,
                value_size,
                padded_key_size,
                padded_value_size,
                block_size,
            )
    key_dims = tl.arange(0, padded_key_dim)[None, :]
    if padded_heads == 1:
        # For every lane, as its threads need it: else it would go through shared memory first.
        places = tl.max(heads, axis=0) * key_dim + key_dims + tl.zeros([lanes, 1], tl.int32)
        asked = tl.load(query + places, mask=key_dims < key_dim, other=0.0).to(tl.float32)
    else:
        asked = tl.load(
            query + heads[:, None] * key_dim + key_dims, mask=is_head[:, None] & (key_dims < key_dim), other=0.0
        )
    even_blocks = next_even_blocks
    odd_blocks = next_odd_blocks
    num_sums: tl.constexpr = lanes if padded_heads == 1 else padded_heads
    maximum = tl.full([num_sums], float("-inf"), tl.float32)
    total = tl.zeros([num_sums], tl.float32)
    summed = tl.zeros([num_sums, padded_value_dim], tl.float32)
    for first in tl.range(lower, upper, 2 * tile_keys, num_stages=1):
        if padded_heads == 1:
            maximum, total, summed = _add_lanes(
                maximum,
                total,
                summed,
                asked,
                even_key,
                even_value,
                first + steps,
                upper,
                scaling,
                softcap,
                dtype,
            )
        else:
            maximum, total, summed = _add_dots(
                maximum,
                total,
                summed,
                asked,
                even_key,
                even_value,
                first + steps,
                upper,
                scaling,
                softcap,
                dtype,
            )
        later = first + 2 * tile_keys + steps
        even_key, even_value = _load_tile(
            keys,
            values,
            even_blocks,
            later,
            upper,
            num_kv_heads,
            key_size,
            value_size,
            padded_key_size,
            padded_value_size,
            block_size,
        )
        even_blocks = _load_blocks(table, later + 2 * tile_keys, upper, block_size)
        # Around products of the tensor cores Triton would let no tile be on its way across a branch.
        if (padded_heads > 1) or (first + tile_keys < upper):
            if padded_heads == 1:
                maximum, total, summed = _add_lanes(
                    maximum,
                    total,
                    summed,
                    asked,
                    odd_key,
                    odd_value,
                    first + tile_keys + steps,
                    upper,
                    scaling,
                    softcap,
                    dtype,
                )
            else:
                maximum, total, summed = _add_dots(
                    maximum,
                    total,
                    summed,
                    asked,
                    odd_key,
                    odd_value,
                    first + tile_keys + steps,
                    upper,
                    scaling,
                    softcap,
                    dtype,
                )
            later += tile_keys
            odd_key, odd_value = _load_tile(
                keys,
                values,
                odd_blocks,
                later,
                upper,
                num_kv_heads,
                key_size,
                value_size,
                padded_key_size,
                padded_value_size,
                block_size,
            )
            odd_blocks = _load_blocks(table, later + 2 * tile_keys, upper, block_size)
    if padded_heads == 1:
        highest = tl.max(maximum, axis=0, keep_dims=True)
        factor = tl.exp2(maximum - finite(highest))
        maximum = highest
        total = tl.sum(total * factor, axis=0, keep_dims=True)
        summed = tl.sum(summed * factor[:, None], axis=0, keep_dims=True)
    return maximum, total, summed


@triton.jit  # type: ignore[untyped-decorator]
def _shares(
    num_seen: tl.tensor, even_bits: tl.tensor, split_bits: tl.tensor, least_share: tl.tensor, most_share: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Keys of a share, and shares that have any, of rows that see so many: see `attention_triton.Splits`."""
    even = ((num_seen + (1 << even_bits) - 1) >> even_bits) + _SHARE_UNIT - 1
    fewest = ((num_seen + (1 << split_bits) - 1) >> split_bits) + _SHARE_UNIT - 1
    keys = tl.maximum(tl.minimum(tl.maximum(even, least_share), most_share), fewest)
    keys = keys // _SHARE_UNIT * _SHARE_UNIT
    return keys, tl.cdiv(num_seen, keys)


@triton.jit  # type: ignore[untyped-decorator]
def _find_share(
    number: tl.tensor,
    context_lens: tl.tensor,
    query_starts: tl.tensor,
    is_mixed: tl.tensor,
    num_rows: tl.tensor,
    even_bits: tl.tensor,
    split_bits: tl.tensor,
    least_share: tl.tensor,
    most_share: tl.tensor,
    window: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Row and split of a share, numbered row by row among those that have no program of their own, and how many there are."""
    num_before = 0
    first_number = 0
    num_shares = 0
    for first in tl.range(0, num_rows, _ROWS_AT_ONCE, num_stages=1):
        rows = first + tl.arange(0, _ROWS_AT_ONCE)
        is_row = rows < num_rows
        is_looked_at = is_row & (is_mixed != 0)
        query_start = tl.load(query_starts + rows, mask=is_looked_at, other=0)
        query_end = tl.load(query_starts + rows + 1, mask=is_looked_at, other=0)
        context_len = tl.load(context_lens + rows, mask=is_row, other=0)
        is_ours = (is_mixed == 0) | ((query_start == rows) & (query_end == rows + 1))
        num_seen = tl.where(is_ours, tl.minimum(context_len, window), 0)
        _, num_used = _shares(num_seen, even_bits, split_bits, least_share, most_share)
        beyond = tl.maximum(num_used - (1 << even_bits), 0)
        is_before = is_row & (num_shares + tl.cumsum(beyond, axis=0) <= number)
        num_before += tl.sum(is_before.to(tl.int32), axis=0)
        first_number += tl.sum(tl.where(is_before, beyond, 0), axis=0)
        num_shares += tl.sum(beyond, axis=0)
    return num_before, (1 << even_bits) + number - first_number, num_shares


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
    num_rows: tl.tensor,
    even_bits: tl.tensor,
    split_bits: tl.tensor,
    least_share: tl.tensor,
    most_share: tl.tensor,
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
    words: tl.constexpr,
    IS_AHEAD: tl.constexpr,
    splits_at_once: tl.constexpr,
    heads_at_once: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Rows whose token is their only one, grid (R, KV heads * head_blocks, Splits.num_layers). Row i's token is token i.

    With `is_mixed`, rows of which that is not true are left to `tile_kernel`. Padding rows give 0. How a row is split depends
    on its length alone. Its first shares have a program each, which ends at once where there are fewer; those beyond, of long
    rows, are numbered and taken by the programs that a head has besides. Should the step have more of these than there are such
    programs, `most_share` is doubled, for all its rows, until it has not.
    With `IS_AHEAD` loads are requested as `_attend_ahead` says. `words`: numbers in an element of keys and values as given.
    With `PDL` it does not end before the kernel in front of it: all programs wait but those without a share.
    Source of the splitting: Dao et al., "Flash-Decoding for long-context inference", 2023.
    """
    row = tl.program_id(0)
    split = tl.program_id(2)
    kv_head = tl.program_id(1) // head_blocks
    first_head = tl.program_id(1) % head_blocks * block_heads
    num_even = 1 << even_bits
    context_len = tl.load(context_lens + row)
    query_start = tl.load(query_starts + row, mask=is_mixed != 0, other=row)
    query_end = tl.load(query_starts + row + 1, mask=is_mixed != 0, other=row + 1)
    if (split < num_even) & ((query_start != row) | (query_end != row + 1)):
        if PDL:
            _wait()
        return
    share, num_used = _shares(tl.minimum(context_len, window), even_bits, split_bits, least_share, most_share)
    if (split >= num_even) | (num_used > num_even):
        # Of a long row, or of any row: what both need to know is how many such shares the step has.
        is_own = split < num_even
        number = (split - num_even) * num_rows + row
        num_numbers = (tl.num_programs(2) - num_even) * num_rows
        found_row, found_split, num_found = _find_share(
            number,
            context_lens,
            query_starts,
            is_mixed,
            num_rows,
            even_bits,
            split_bits,
            least_share,
            most_share,
            window,
        )
        while num_found > num_numbers:
            most_share *= 2
            found_row, found_split, num_found = _find_share(
                number,
                context_lens,
                query_starts,
                is_mixed,
                num_rows,
                even_bits,
                split_bits,
                least_share,
                most_share,
                window,
            )
        row = tl.where(is_own, row, found_row)
        split = tl.where(is_own, split, found_split)
        context_len = tl.load(context_lens + row, mask=row < num_rows, other=0)
        share, num_used = _shares(tl.minimum(context_len, window), even_bits, split_bits, least_share, most_share)
    if split >= tl.maximum(num_used, 1):
        return  # at once, even with PDL: the row's first split waits
    if PDL:
        row = _uniform(row)
        split = _uniform(split)
        context_len = _uniform(context_len)
        share = _uniform(share)
        num_used = _uniform(num_used)

    group_heads = first_head + tl.arange(0, padded_heads)
    is_head = (tl.arange(0, padded_heads) < block_heads) & (group_heads < group)
    heads = kv_head * group + group_heads
    value_dims = tl.arange(0, padded_value_dim)
    is_value = value_dims < value_dim
    num_heads = num_kv_heads * group
    keys += kv_head * (key_dim // words)
    values += kv_head * (value_dim // words)
    lower = tl.maximum(context_len - window, 0) + split * share
    upper = tl.minimum(lower + share, context_len)
    table = block_tables + row * table_stride
    row_query = query + row.to(tl.int64) * query_stride
    if IS_AHEAD:
        maximum, total, summed = _attend_ahead(
            row_query,
            heads,
            is_head,
            keys,
            values,
            table,
            lower,
            upper,
            context_len - 1,
            scaling,
            softcap,
            num_kv_heads,
            key_dim,
            value_dim,
            padded_key_dim,
            padded_value_dim,
            block_size,
            padded_heads,
            tile_keys,
            lanes,
            words,
            PDL,
        )
    else:
        if PDL:
            _wait()
        key_dims = tl.arange(0, padded_key_dim)
        asked = tl.load(
            row_query + heads[:, None] * key_dim + key_dims[None, :],
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

    row_out = out + row.to(tl.int64) * num_heads * value_dim
    if num_used <= 1:
        result = finish(maximum, total, summed, sinks, heads, is_head)
        store(row_out, result, heads, is_head, value_dims, value_dim)
    else:
        places = ((row * num_heads + heads) << split_bits) + split
        tl.store(
            sums + places[:, None] * value_dim + value_dims[None, :],
            summed,
            mask=is_head[:, None] & is_value[None, :],
        )
        tl.store(maxima + places, maximum, mask=is_head)
        tl.store(totals + places, total, mask=is_head)
        # All threads have stored before one of them tells so.
        tl.debug_barrier()
        arrival = arrivals + row * num_heads + tl.program_id(1)
        if tl.atomic_add(arrival, 1, sem="acq_rel") == num_used - 1:
            # The next layer counts from 0 again.
            tl.store(arrival, 0)
            for base in tl.range(0, block_heads, heads_at_once):
                local = base + tl.arange(0, heads_at_once)
                is_some = (local < block_heads) & (first_head + local < group)
                some = kv_head * group + first_head + local
                maximum_of_all = tl.full([heads_at_once], float("-inf"), tl.float32)
                total_of_all = tl.zeros([heads_at_once], tl.float32)
                sum_of_all = tl.zeros([heads_at_once, padded_value_dim], tl.float32)
                for first_split in tl.range(0, num_used, splits_at_once, num_stages=1):
                    splits = first_split + tl.arange(0, splits_at_once)
                    parts = ((row * num_heads + some) << split_bits)[:, None] + splits[None, :]
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
                    highest = tl.maximum(maximum_of_all, tl.max(part_maximum, axis=1))
                    top = finite(highest)
                    factor = tl.exp2(part_maximum - top[:, None])
                    factor_of_all = tl.exp2(maximum_of_all - top)
                    total_of_all = total_of_all * factor_of_all + tl.sum(part_total * factor, axis=1)
                    sum_of_all *= factor_of_all[:, None]
                    sum_of_all += tl.sum(part_summed * factor[:, :, None], axis=1)
                    maximum_of_all = highest
                result = finish(maximum_of_all, total_of_all, sum_of_all, sinks, some, is_some)
                store(row_out, result, some, is_some, value_dims, value_dim)
