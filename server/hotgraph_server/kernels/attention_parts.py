"""What the Triton kernels of attention share: scores and their weights, places in the cache, the loop over keys, the wait.

Names: R rows, T tokens; a group is the query heads that share a KV head, of which a program serves `block_heads`; a padded
size is a power of two. What is marked tl.constexpr follows from the model and from tables of the launch, never from a step.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

_LOG2_E = tl.constexpr(1.4426950408889634)

# Sizes of the step and what may differ from layer to layer: a kernel made for one value of them would have to be compiled for
# the next one, maybe inside a capture.
VARIABLE = [
    "even_bits",
    "is_mixed",
    "least_share",
    "most_share",
    "num_rows",
    "num_tokens",
    "split_bits",
    "table_stride",
    "window",
]


@triton.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def wait() -> None:
    """Returns when the kernel before has ended, and so have all before that; the one behind may start from here on."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def to_scores(products: tl.tensor, scaling: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """Scores to base 2: weights are 2**score. tanh is made of the exponential, which may overflow to the right result."""
    if softcap is not None:
        capped = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(products * (scaling / softcap * 2.0 * _LOG2_E))))
        return capped * _LOG2_E
    else:  # noqa: RET505  # Triton wants the branch that it does not take out of its sight
        return products * (scaling * _LOG2_E)


@triton.jit  # type: ignore[untyped-decorator]
def finite(maximum: tl.tensor) -> tl.tensor:
    """What to subtract from scores: 0 where nothing was seen yet, as infinities cannot be subtracted."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit  # type: ignore[untyped-decorator]
def finish(
    maximum: tl.tensor, total: tl.tensor, summed: tl.tensor, sinks: tl.tensor, heads: tl.tensor, is_head: tl.tensor
) -> tl.tensor:
    """The weighted mean, [n, dim], of n heads; 0 where nothing was seen. A sink takes weight and gives no value."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=is_head, other=0.0).to(tl.float32) * _LOG2_E
        top = finite(tl.maximum(maximum, sink))
        factor = tl.exp2(maximum - top)
        total = total * factor + tl.exp2(sink - top)
        summed = summed * factor[:, None]
    return summed / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def store(
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
def slots(table: tl.tensor, positions: tl.tensor, is_seen: tl.tensor, block_size: tl.constexpr) -> tl.tensor:
    """Where a row's positions stand in the cache: block * block size + offset, int64 as caches are large."""
    blocks = tl.load(table + positions // block_size, mask=is_seen, other=0).to(tl.int64)
    return blocks * block_size + positions % block_size


@triton.jit  # type: ignore[untyped-decorator]
def weigh(
    asked: tl.tensor,
    key: tl.tensor,
    is_seen: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A tile more: the weights [rows, keys] of keys, the new maximum and total [rows], and what sums so far are scaled by.

    asked: [rows, dim]; key: [keys, dim]; is_seen: whether a row sees a key, [rows or 1, keys].
    """
    # Products of float32 in full: the default, TF32, keeps ten bits.
    scores = to_scores(tl.dot(asked, tl.trans(key), input_precision="ieee"), scaling, softcap)
    scores = tl.where(is_seen, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    top = finite(new_maximum)
    factor = tl.exp2(maximum - top)
    weights = tl.exp2(scores - top[:, None])
    return weights, new_maximum, total * factor + tl.sum(weights, axis=1), factor


@triton.jit  # type: ignore[untyped-decorator]
def attend_dots(
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
        places = (slots(table, positions, is_there, block_size) * num_kv_heads)[:, None]
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
        # How far back a key lies; in the future it is beyond any window, as it wraps around.
        distances = (query_positions[:, None] - positions[None, :]).to(tl.uint32)
        is_seen = (distances < window.to(tl.uint32)) & is_there[None, :]
        weights, maximum, total, factor = weigh(asked, key, is_seen, maximum, total, scaling, softcap)
        summed = tl.dot(weights.to(value.dtype), value, acc=summed * factor[:, None], input_precision="ieee")
    return maximum, total, summed
