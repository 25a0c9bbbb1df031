"""Decode: the Triton kernel of attention for rows of one token.

Each row's keys are split in shares (`attention_shares.py`), and the last program to finish one adds up what all have found, in
the order of the shares. Lengths are known to the device alone, so the grid has a few programs for each row, and some for
whatever shares long rows have beyond these. In a step with longer rows it passes over them. Names as in `attention_parts.py`.

With `PDL` it is a link of a chain, as `few_rows_parts.py` says, and may start while the kernel before, which
makes this layer's queries, keys and values, still runs. What is older is complete by then if that one lets it start only after
its own wait, or ends without letting anything start: then all before it have ended. So before its wait a program reads lengths,
tables, and keys and values of earlier steps, which is all but the position of the row's own token; it does not read queries,
nor does it write: the layer before may still read its result, and then its scratch, too, until the wait is over.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.attention_ahead import attend_ahead
from hotgraph_server.kernels.attention_parts import VARIABLE, attend_dots, finish, finite, store, wait
from hotgraph_server.kernels.attention_shares import find_share, shares


@triton.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def _uniform(number: tl.tensor) -> tl.tensor:
    """The number, which is the same in all threads, told to the compiler to be so: it then takes no register of each thread."""
    return tl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [number], dtype=tl.int32, is_pure=True, pack=1
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
    With `IS_AHEAD` loads are requested as `attend_ahead` says. `words`: numbers in an element of keys and values as given.
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
            wait()
        return
    share, num_used = shares(tl.minimum(context_len, window), even_bits, split_bits, least_share, most_share)
    if (split >= num_even) | (num_used > num_even):
        # Of a long row, or of any row: what both need to know is how many such shares the step has.
        is_own = split < num_even
        number = (split - num_even) * num_rows + row
        num_numbers = (tl.num_programs(2) - num_even) * num_rows
        found_row, found_split, num_found = find_share(
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
            found_row, found_split, num_found = find_share(
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
        share, num_used = shares(tl.minimum(context_len, window), even_bits, split_bits, least_share, most_share)
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
        maximum, total, summed = attend_ahead(
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
            wait()
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
                    # Rounded before it is added: joined with the addition, each thread would add its own product unrounded
                    # to the rounded one of another, and copies of a total would differ from thread to thread.
                    weighed = tl.fma(part_total, factor, tl.zeros([heads_at_once, splits_at_once], tl.float32))
                    total_of_all = total_of_all * factor_of_all + tl.sum(weighed, axis=1)
                    sum_of_all *= factor_of_all[:, None]
                    sum_of_all += tl.sum(part_summed * factor[:, :, None], axis=1)
                    maximum_of_all = highest
                result = finish(maximum_of_all, total_of_all, sum_of_all, sinks, some, is_some)
                store(row_out, result, some, is_some, value_dims, value_dim)
