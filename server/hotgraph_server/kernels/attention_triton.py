"""Launches the Triton kernels of causal attention over the paged cache. Of the step it knows sizes, no lengths.

So that a graph can hold it: grids follow from the step's padded shape and the model, never from a length; no kernel is tuned
or compiled for a number of tokens or rows; nothing is allocated but the scratch that all layers of a step share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from hotgraph_server.kernels.again import launch_as, launched_again
from hotgraph_server.kernels.attention_cuts import (
    NO_WINDOW,
    InvariantTile,
    Splits,
    decode_cut,
    decode_options,
    invariant_parts,
    invariant_tiles,
    split_rows,
    tile_options,
)
from hotgraph_server.kernels.attention_decode import decode_kernel
from hotgraph_server.kernels.attention_invariant import ALL_ROWS, OTHER_ROWS, ROWS_OF_ONE, invariant_kernel
from hotgraph_server.kernels.attention_rows import DeviceRows
from hotgraph_server.kernels.attention_tiles import tile_kernel
from hotgraph_server.kernels.jit import next_power_of_two

_MAX_HEADS = 32
"""Query heads a program may serve; further ones of the same KV head go to other programs, or registers would run out."""
_SHARES_AT_ONCE = 8  # of a shared row, loaded together


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and all that it is launched with: it can be run (`kernel[grid](**arguments)`), or compiled only."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


def triton_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: DeviceRows,
    out: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    pdl: bool = False,
    is_invariant: bool = False,
) -> None:
    """Writes all of `out`, contiguous [T, query heads, value_dim]; the rest is as in `attention.paged_attention`."""
    if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        # One copy here, so that kernels know of one stride, which does not depend on the number of tokens.
        query = query.contiguous()
    options: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": softcap}
    options |= {"pdl": pdl, "is_invariant": is_invariant}
    for plan in _plans_of(query, keys, values, rows, out, **options):
        tensors = _tensors(plan, query, keys, values, rows, out, sinks)
        if not launched_again(plan, tensors):
            launch_as(plan, plan.kernel, plan.grid, tensors, _arguments(plan, tensors))


def launches(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: DeviceRows,
    out: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    pdl: bool = False,
    is_invariant: bool = False,
) -> list[Launch]:
    """What `triton_attention` runs, in order, for a query of heads that lie side by side."""
    options: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": softcap}
    options |= {"pdl": pdl, "is_invariant": is_invariant}
    return [
        Launch(plan.kernel, plan.grid, _arguments(plan, _tensors(plan, query, keys, values, rows, out, sinks)))
        for plan in _plans_of(query, keys, values, rows, out, **options)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """A launch without its tensors, which may be another layer's or step's.

    scratch: sizes that `DeviceRows.scratch` is asked for; is_paired: elements of 16 bits are loaded two at a time.
    """

    kernel: Any
    grid: tuple[int, ...]
    numbers: dict[str, Any]
    scratch: tuple[int, int, int] | None = None
    is_paired: bool = False


def _plans_of(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: DeviceRows,
    out: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    pdl: bool,
    is_invariant: bool,
) -> tuple[_Plan, ...]:
    assert keys.is_contiguous(), "the cache is contiguous"
    assert values.is_contiguous(), "the cache is contiguous"
    assert out.is_contiguous(), "the result is contiguous"
    num_tokens, num_heads, key_dim = query.shape
    assert num_tokens == rows.num_tokens, "the query has the step's tokens"
    return _plans(
        num_tokens,
        rows.num_rows,
        num_heads,
        values.shape[2],
        key_dim,
        values.shape[3],
        keys.dtype,
        rows.block_size,
        rows.block_tables.shape[1],
        rows.block_tables.stride(0),
        query.stride(0),
        float(scaling),
        window,
        None if softcap is None else float(softcap),
        pdl,
        is_invariant,
    )


@lru_cache(maxsize=4096)  # asked for each layer of each step; eager steps may have any number of tokens
def _plans(
    num_tokens: int,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    block_size: int,
    table_width: int,
    table_stride: int,
    query_stride: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
    pdl: bool,
    is_invariant: bool,
) -> tuple[_Plan, ...]:
    """One or two, in order: for rows of one token, and for all others."""
    group = num_heads // num_kv_heads
    num_head_blocks = -(-group // _MAX_HEADS)
    heads = -(-group // num_head_blocks)
    padded_key_dim = max(16, next_power_of_two(key_dim))
    padded_value_dim = max(16, next_power_of_two(value_dim))
    row_bytes = max(padded_key_dim, padded_value_dim) * dtype.itemsize
    common = {
        "table_stride": table_stride,
        "query_stride": query_stride,
        "scaling": scaling,
        "softcap": softcap,
        "window": NO_WINDOW if window is None else window,
        "num_kv_heads": num_kv_heads,
        "group": group,
        "block_heads": heads,
        "head_blocks": num_head_blocks,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "padded_key_dim": padded_key_dim,
        "padded_value_dim": padded_value_dim,
        "block_size": block_size,
        "num_rows": num_rows,
    }
    num_programs = num_kv_heads * num_head_blocks
    if is_invariant:
        return _invariant_plans(common, num_tokens, table_width * block_size, row_bytes, dtype, window, pdl=pdl)
    is_decode = num_tokens == num_rows
    # A lone row is not worth a second launch: should it be one token in a longer step, the tiles take it.
    is_mixed = not is_decode and num_rows > 1
    common["is_mixed"] = int(is_mixed)
    plans = []
    if is_decode or is_mixed:
        cut = decode_cut(heads, row_bytes, dtype, num_rows * num_programs)
        # A row is no longer than its table, whatever the step.
        max_context = table_width * block_size if window is None else min(table_width * block_size, window)
        splits = split_rows(num_rows, num_programs, cut, max_context=max_context)
        options = decode_options(cut, heads, row_bytes, padded_value_dim)
        is_paired = bool(options["IS_AHEAD"]) and dtype.itemsize == 2 and key_dim % 2 == value_dim % 2 == 0
        numbers = {**common, **options, **_split_arguments(splits), "words": 2 if is_paired else 1, "PDL": pdl}
        if pdl:  # named only where it is wanted: the interpreter does not know it
            numbers["launch_pdl"] = True
        grid = (num_rows, num_programs, splits.num_layers)
        plans.append(_Plan(decode_kernel, grid, numbers, (num_heads, splits.max_splits, value_dim), is_paired))
    if not is_decode:
        of_tiles = tile_options(heads, row_bytes, dtype)
        # Rows and the padding after them start a tile each, wherever the one before ended.
        num_tiles = num_tokens // of_tiles["tile_tokens"] + num_rows + 1
        numbers = {**common, **of_tiles, "num_tokens": num_tokens}
        plans.append(_Plan(tile_kernel, (num_tiles, num_programs), numbers))
    return tuple(plans)


def _tensors(
    plan: _Plan,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: DeviceRows,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
) -> dict[str, torch.Tensor | None]:
    tensors = {
        "out": out,
        "query": query,
        "keys": keys,
        "values": values,
        "sinks": sinks,
        "block_tables": rows.block_tables,
        "context_lens": rows.context_lens,
        "query_starts": rows.query_starts,
    }
    if plan.scratch is not None:
        scratch = rows.scratch(*plan.scratch)
        tensors["sums"], tensors["maxima"] = scratch.sums, scratch.maxima
        tensors["totals"], tensors["arrivals"] = scratch.totals, scratch.arrivals
    return tensors


def _arguments(plan: _Plan, tensors: dict[str, torch.Tensor | None]) -> dict[str, Any]:
    arguments = {**tensors, **plan.numbers}
    if plan.is_paired:
        arguments |= {name: arguments[name].view(torch.int32) for name in ("keys", "values")}
    return arguments


def _invariant_plans(
    common: dict[str, Any],
    num_tokens: int,
    max_context: int,
    row_bytes: int,
    dtype: torch.dtype,
    window: int | None,
    *,
    pdl: bool,
) -> tuple[_Plan, ...]:
    """The step chooses tiles, and how many programs share a row: none of it touches the order of a sum."""
    heads, num_rows, value_dim = common["block_heads"], common["num_rows"], common["value_dim"]
    num_heads = common["num_kv_heads"] * common["group"]
    num_programs = common["num_kv_heads"] * common["head_blocks"]
    is_padded = common["key_dim"] != common["padded_key_dim"] or value_dim != common["padded_value_dim"]
    options = tile_options(heads, row_bytes, dtype)
    # Masks of what is padded do not fit the registers of four warps.
    large = InvariantTile(options["tile_rows"], 8 if is_padded else options["num_warps"], num_together=2)
    tiles = invariant_tiles(large, num_rows, num_tokens, num_programs, heads)
    # A window may begin and end within a share.
    most_seen = max_context if window is None else min(max_context, window + options["tile_keys"])
    max_shares = -(-most_seen // options["tile_keys"])
    if tiles[0] == tiles[1]:
        served = {ALL_ROWS: tiles[1]}
    elif num_tokens == num_rows:
        served = {ALL_ROWS: tiles[0]}
    else:
        served = {ROWS_OF_ONE: tiles[0], OTHER_ROWS: tiles[1]}
    plans = []
    for rows, tile in served.items():
        num_parts = 1
        if rows != OTHER_ROWS:
            num_parts = invariant_parts(
                num_rows,
                num_tokens,
                num_programs,
                max_shares,
                num_together=tile.num_together,
                share_bytes=4 * num_heads * (value_dim + 2),
            )
        # Of the sums of so many shares, what fits 64 registers of each thread.
        most_heads = 32 * tile.num_warps * 64 // (_SHARES_AT_ONCE * common["padded_value_dim"])
        numbers = {
            **common,
            **options,
            "tile_rows": tile.tile_rows,
            "tile_tokens": tile.tile_rows // heads,
            "num_warps": tile.num_warps,
            "served": rows,
            "max_shares": max_shares,
            "num_tokens": num_tokens,
            "heads_at_once": max(1, min(next_power_of_two(heads), most_heads)),
            "shares_at_once": _SHARES_AT_ONCE,
            "PDL": pdl,
        }
        if pdl:  # as below
            numbers["launch_pdl"] = True
        num_tiles = num_tokens // numbers["tile_tokens"] + num_rows + 1
        scratch = (num_heads, max_shares if num_parts > 1 else 1, value_dim)
        plans.append(_Plan(invariant_kernel, (num_tiles, num_programs, num_parts), numbers, scratch))
    return tuple(plans)


def _split_arguments(splits: Splits) -> dict[str, int]:
    return {
        "even_bits": splits.num_even.bit_length() - 1,
        "split_bits": splits.max_splits.bit_length() - 1,
        "least_share": splits.least_share,
        "most_share": splits.most_share,
    }
