"""Launches the Triton kernels of causal attention over the paged cache. Of the step it knows sizes, no lengths.

So that a graph can hold it: grids follow from the step's padded shape and the model, never from a length; no kernel is tuned
or compiled for a number of tokens or rows; nothing is allocated but the scratch that all layers of a step share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped]  # it comes without types

from hotgraph_server.kernels.attention_decode import decode_kernel
from hotgraph_server.kernels.attention_tiles import tile_kernel

MAX_SPLITS = 16
"""Programs that may share the keys of one row and KV head."""
FULL_GRID = 256
"""Decode programs from which rows of one length gain nothing by splits: about two for each of an H100's 132 multiprocessors."""
LANE_GRID = 1024
"""Programs to split rows into where there are fewer than FULL_GRID, and each serves one head: those are small ones."""
LONG_SHARE = 2048
"""Keys from which on a row is split in a full grid, too: a long row would keep few programs busy when all others are done."""
LONG_SPLITS = 4
"""Splits of a row in a full grid: in a step without long rows all but the first are programs that only start and end."""
_LEAST_SHARE = 16
_MAX_HEADS = 32
"""Query heads a program may serve; further ones of the same KV head go to other programs, or registers would run out."""
_NO_WINDOW = 1 << 30


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where the splits of a row leave what they found. For R rows, H query heads, S splits, float32 unless said otherwise.

    sums [R, H, S, value_dim]: values weighted by 2**(score - maximum); maxima and totals [R, H, S]: of scores to base 2, and of
    those weights; arrivals: int32, 0 between launches, for each row and program of its heads, how many splits are done.
    """

    sums: torch.Tensor
    maxima: torch.Tensor
    totals: torch.Tensor
    arrivals: torch.Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and all that it is launched with: it can be run (`kernel[grid](**arguments)`), or compiled only."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class DeviceRows:
    """A step's rows as the kernels read them: tensors whose values may change from replay to replay, and static sizes.

    block_tables: int32 [R, max_blocks]; context_lens: int32 [R]; query_starts: int32 [R + 1]; T tokens, padding included.
    T = R says that every row has one token or is padding.
    """

    def __init__(
        self,
        *,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        query_starts: torch.Tensor,
        num_tokens: int,
        block_size: int,
    ) -> None:
        self.block_tables = block_tables
        self.context_lens = context_lens
        self.query_starts = query_starts
        self.num_tokens = num_tokens
        self.num_rows = block_tables.shape[0]
        self.block_size = block_size
        self._scratch: dict[tuple[int, int, int], Scratch] = {}

    def num_splits(self, num_kv_heads: int, num_heads: int, window: int | None) -> int:
        """See `split_count`. A row is no longer than its table, whatever the step."""
        max_context = self.block_tables.shape[1] * self.block_size
        return split_count(
            self.num_rows,
            num_kv_heads,
            is_grouped=num_heads > num_kv_heads,
            max_context=max_context if window is None else min(max_context, window),
        )

    def scratch(self, num_heads: int, num_splits: int, value_dim: int) -> Scratch | None:
        """One for all layers of this shape, as they run one after the other; None when rows are not split."""
        if num_splits == 1:
            return None
        key = (num_heads, num_splits, value_dim)
        scratch = self._scratch.get(key)
        if scratch is None:
            device, shape = self.block_tables.device, (self.num_rows, num_heads, num_splits)
            scratch = Scratch(
                sums=torch.empty(*shape, value_dim, dtype=torch.float32, device=device),
                maxima=torch.empty(shape, dtype=torch.float32, device=device),
                totals=torch.empty(shape, dtype=torch.float32, device=device),
                arrivals=torch.zeros(self.num_rows, num_heads, dtype=torch.int32, device=device),
            )
            self._scratch[key] = scratch
        return scratch


def split_count(num_rows: int, num_kv_heads: int, *, is_grouped: bool, max_context: int) -> int:
    """Splits of each row, a power of two: as many as fill the grid; where it is full without, as the longest row may need.

    is_grouped: heads share KV heads; max_context: what a row can have at most, not what the rows at hand have.
    """
    num_programs = num_rows * num_kv_heads
    num_splits = 1
    if num_programs >= FULL_GRID:
        while num_splits < LONG_SPLITS and num_splits * LONG_SHARE < max_context:
            num_splits *= 2
        return num_splits
    wanted = FULL_GRID if is_grouped else LANE_GRID
    while num_splits < MAX_SPLITS and num_programs * num_splits < wanted:
        num_splits *= 2
    return num_splits


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
) -> None:
    """Writes all of `out`, contiguous [T, query heads, value_dim]; the rest is as in `attention.paged_attention`."""
    for launch in launches(
        query, keys, values, rows, out, scaling=scaling, window=window, softcap=softcap, sinks=sinks, pdl=pdl
    ):
        launch.kernel[launch.grid](**launch.arguments)


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
) -> list[Launch]:
    """What `triton_attention` runs, in order."""
    assert keys.is_contiguous(), "the cache is contiguous"
    assert values.is_contiguous(), "the cache is contiguous"
    assert out.is_contiguous(), "the result is contiguous"
    num_tokens, num_heads, key_dim = query.shape
    assert num_tokens == rows.num_tokens, "the query has the step's tokens"
    if query.stride(2) != 1 or query.stride(1) != key_dim:
        # One copy here, so that kernels know of one stride, which does not depend on the number of tokens.
        query = query.contiguous()
    num_kv_heads, value_dim = values.shape[2], values.shape[3]
    group = num_heads // num_kv_heads
    num_head_blocks = -(-group // _MAX_HEADS)
    heads = -(-group // num_head_blocks)
    padded_key_dim = max(16, triton.next_power_of_2(key_dim))
    padded_value_dim = max(16, triton.next_power_of_2(value_dim))
    row_bytes = max(padded_key_dim, padded_value_dim) * keys.element_size()
    common = {
        "out": out,
        "query": query,
        "keys": keys,
        "values": values,
        "sinks": sinks,
        "block_tables": rows.block_tables,
        "context_lens": rows.context_lens,
        "query_starts": rows.query_starts,
        "table_stride": rows.block_tables.stride(0),
        "query_stride": query.stride(0),
        "scaling": float(scaling),
        "softcap": None if softcap is None else float(softcap),
        "window": _NO_WINDOW if window is None else window,
        "num_kv_heads": num_kv_heads,
        "group": group,
        "block_heads": heads,
        "head_blocks": num_head_blocks,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "padded_key_dim": padded_key_dim,
        "padded_value_dim": padded_value_dim,
        "block_size": rows.block_size,
    }
    num_programs = num_kv_heads * num_head_blocks
    is_decode = num_tokens == rows.num_rows
    # A lone row is not worth a second launch: should it be one token in a longer step, the tiles take it.
    is_mixed = not is_decode and rows.num_rows > 1
    result = []
    if is_decode or is_mixed:
        num_splits = rows.num_splits(num_kv_heads, num_heads, window)
        scratch = rows.scratch(num_heads, num_splits, value_dim)
        num_decode_programs = rows.num_rows * num_kv_heads
        is_full = num_decode_programs >= FULL_GRID
        options = _decode_options(heads, row_bytes, padded_value_dim, keys.dtype, num_decode_programs)
        arguments: dict[str, Any] = {
            **common,
            **options,
            "is_mixed": int(is_mixed),
            "least_share": LONG_SHARE if is_full else _LEAST_SHARE,
            "words": 1,
            "PDL": pdl,
        }
        if options["IS_AHEAD"] and keys.element_size() == 2 and key_dim % 2 == value_dim % 2 == 0:
            arguments |= {"words": 2, "keys": keys.view(torch.int32), "values": values.view(torch.int32)}
        if pdl:  # named only where it is wanted: the interpreter does not know it
            arguments["launch_pdl"] = True
        for name in ("sums", "maxima", "totals", "arrivals"):
            arguments[name] = None if scratch is None else getattr(scratch, name)
        result.append(Launch(decode_kernel, (rows.num_rows, num_programs, num_splits), arguments))
    if not is_decode:
        tile_options = _tile_options(heads, row_bytes, keys.dtype)
        # Rows and the padding after them start a tile each, wherever the one before ended.
        num_tiles = num_tokens // tile_options["tile_tokens"] + rows.num_rows + 1
        arguments = {**common, **tile_options, "is_mixed": int(is_mixed), "num_tokens": num_tokens}
        arguments["num_rows"] = rows.num_rows
        result.append(Launch(tile_kernel, (num_tiles, num_programs), arguments))
    return result


def _decode_options(
    heads: int, row_bytes: int, padded_value_dim: int, dtype: torch.dtype, num_programs: int
) -> dict[str, int]:
    """num_programs: without splits. Few choices, as each is a kernel of its own.

    A program of `_attend_ahead` has two tiles on their way in its registers, so a tile is small, and the smaller the more
    programs there are or the shorter their shares. Grouped heads in a full grid take larger tiles through shared memory.
    """
    num_warps, num_rounds = 4, 1
    is_full = num_programs >= FULL_GRID
    is_ahead = heads == 1 or not is_full
    tile_keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    if heads > 1 and dtype == torch.float32:  # multiplied outside the tensor cores, and out of registers
        tile_keys, num_warps = 16, 8
    elif heads == 1 and (not is_full or num_programs >= LANE_GRID):
        tile_keys, num_warps, num_rounds = 16, 2, 2
    elif is_ahead:
        tile_keys = max(16, tile_keys // 2)
    return {
        "IS_AHEAD": is_ahead,
        "padded_heads": 1 if heads == 1 else max(16, triton.next_power_of_2(heads)),  # tl.dot takes 16 rows at least
        "tile_keys": tile_keys,
        # As many keys as the threads can load in a round, or two, with 16 bytes each: a lane's keys are all its own threads'.
        "lanes": max(1, min(tile_keys, num_rounds * num_warps * 32 * 16 // row_bytes)),
        "max_splits": MAX_SPLITS,
        # Of the sums of all splits, what fits 64 registers of each thread.
        "heads_at_once": max(
            1, min(triton.next_power_of_2(heads), num_warps * 2048 // (MAX_SPLITS * padded_value_dim))
        ),
        "num_warps": num_warps,
        "num_stages": 2,
    }


def _tile_options(heads: int, row_bytes: int, dtype: torch.dtype) -> dict[str, int]:
    """64 x 64 was best or near it on an H200 for 128 elements of 16 bits; wider rows take fewer keys or more warps."""
    tile_rows, tile_keys, num_warps = 64, 64, 4
    if dtype == torch.float32:  # as above
        tile_rows, tile_keys, num_warps = 32, 32 if row_bytes <= 256 else 16, 8
    elif row_bytes > 512:
        tile_rows, tile_keys, num_warps = 32, 16, 8
    elif row_bytes > 256:
        tile_keys, num_warps = 32, 8
    return {
        "tile_rows": tile_rows,
        "tile_tokens": tile_rows // heads,
        "tile_keys": tile_keys,
        "num_warps": num_warps,
        "num_stages": 2,
    }
