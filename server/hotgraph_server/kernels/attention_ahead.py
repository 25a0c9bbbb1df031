"""Decode: attention of one token to a share of its row's keys, which are requested ahead. It knows no splits.

Keys and values of earlier steps are requested before the wait for the kernel before, and two tiles are on their way at any time
from then on. `attention_decode.py` says what may be read so early. Names as in `attention_parts.py`.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.attention_parts import finite, to_scores, wait, weigh


@triton.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
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
def attend_ahead(
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
        wait()
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
