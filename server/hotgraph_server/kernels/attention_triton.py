"""Launches the Triton kernels of causal attention over the paged cache. Of the step it knows sizes, no lengths.

So that a graph can hold it: grids follow from the step's padded shape and the model, never from a length; no kernel is tuned
or compiled for a number of tokens or rows; nothing is allocated but the scratch that all layers of a step share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton  # type: ignore[import-untyped]  # it comes without types

from hotgraph_server.kernels.again import launch_as, launched_again
from hotgraph_server.kernels.attention_decode import decode_kernel
from hotgraph_server.kernels.attention_invariant import invariant_kernel
from hotgraph_server.kernels.attention_tiles import tile_kernel

MULTIPROCESSORS = 132
"""Of an H100 or H200, where the choices below were measured."""
MAX_SPLITS = 32
"""Shares of a row at most: programs that may meet for a row and KV head."""
FULL_GRID = 256
"""Decode programs of one head each from which a step is one of many rows: about two for each multiprocessor without splits."""
FEW_GROUPS = 16
"""Decode programs of grouped heads, without splits, up to which they load ahead: more keep the memory busy without that."""
LONG_SHARE = 1024
"""Keys of a share at most: one that long costs nothing over a longer one, and a long row keeps no program busy for longer."""
_MAX_PARTS = 1024  # shares that the scratch of a step has room for, if all rows have as many: 17 MB for 32 heads of 128
_MAX_HEADS = 32
"""Query heads a program may serve; further ones of the same KV head go to other programs, or registers would run out."""
_NO_WINDOW = 1 << 30
INVARIANT_TOGETHER = 2
"""Programs of `attention_invariant.py` that a multiprocessor has registers for."""
_SHARES_AT_ONCE = 8  # of a shared row, loaded together
_MAX_INVARIANT_BYTES = 64 << 20  # of scratch of a step; rows that would need more are not shared among programs


@dataclass(frozen=True, slots=True)
class Splits:
    """How decode rows are split: each by its own length, which the device knows, whatever the others' are.

    A row that sees n keys has shares of n / num_even of them, but of `least_share` at least and `most_share` at most, unless it
    had more than max_splits then; of a multiple of 16. num_even and max_splits are powers of two. Of each row the first
    num_even shares have a program of their own; what is left has, whatever row it is of, one of the num_extra programs that
    there are for each row of the step. Only in a step of so many long rows that these do not suffice `most_share` is more.
    """

    num_even: int
    max_splits: int
    num_extra: int
    least_share: int
    most_share: int

    @property
    def num_layers(self) -> int:
        """Programs of each row and head."""
        return self.num_even + self.num_extra


@dataclass(frozen=True, slots=True)
class Cut:
    """How a decode program works. num_together: those that a multiprocessor has registers and shared memory for,
    which may have to be told to the compiler: max_registers, of a thread.

    num_rounds: loads of 16 bytes of a thread that a lane's key takes; is_ahead: see `attention_decode.py`.
    """

    tile_keys: int
    num_warps: int
    num_rounds: int
    is_ahead: bool
    num_together: int
    least_share: int
    max_registers: int | None = None


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where the splits of a row leave what they found. R rows, H query heads, S splits at most; float32 unless said otherwise.

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

    def scratch(self, num_heads: int, num_splits: int, value_dim: int) -> Scratch:
        """One for all layers of this shape, as they run one after the other."""
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


def split_rows(num_rows: int, num_programs: int, cut: Cut, *, max_context: int) -> Splits:
    """How a step's rows are split so that as many programs run as can at a time, if it has so many rows of one length.

    num_programs: of a row, without splits; max_context: what a row can have at most, not what the rows at hand have.
    """
    room = MULTIPROCESSORS * cut.num_together
    useful = min(MAX_SPLITS, -(-max_context // cut.least_share))
    num_even = 1
    while 2 * num_even <= MAX_SPLITS and num_even < useful and 2 * num_even * num_rows * num_programs <= room:
        num_even *= 2
    max_splits = max(num_even, 2)  # so that there is scratch always, and no kernel for steps without
    # A lone row has no others to keep waiting.
    while num_rows > 1 and max_splits < MAX_SPLITS and max_splits * LONG_SHARE < max_context:
        if max_splits >= 4 and 2 * max_splits * num_rows > _MAX_PARTS:
            break
        max_splits *= 2
    num_extra = 0
    if num_rows > 1 and num_even * LONG_SHARE < max_context:
        # As many as can run at a time, or else one for each share that there can be.
        num_extra = min(max_splits - num_even, max(1, -(-room // (num_programs * num_rows))))
    most_share = max(LONG_SHARE, cut.least_share) if num_extra > 0 else _NO_WINDOW
    return Splits(num_even, max_splits, num_extra, cut.least_share, most_share)


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
    """One or two, in order: for rows of one token, and for all others; one for both where it is invariant."""
    group = num_heads // num_kv_heads
    num_head_blocks = -(-group // _MAX_HEADS)
    heads = -(-group // num_head_blocks)
    padded_key_dim = max(16, triton.next_power_of_2(key_dim))
    padded_value_dim = max(16, triton.next_power_of_2(value_dim))
    row_bytes = max(padded_key_dim, padded_value_dim) * dtype.itemsize
    common = {
        "table_stride": table_stride,
        "query_stride": query_stride,
        "scaling": scaling,
        "softcap": softcap,
        "window": _NO_WINDOW if window is None else window,
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
        return (_invariant_plan(common, num_tokens, table_width * block_size, row_bytes, dtype, window, pdl=pdl),)
    is_decode = num_tokens == num_rows
    # A lone row is not worth a second launch: should it be one token in a longer step, the tiles take it.
    is_mixed = not is_decode and num_rows > 1
    common["is_mixed"] = int(is_mixed)
    plans = []
    if is_decode or is_mixed:
        cut = _cut(heads, row_bytes, dtype, num_rows * num_programs)
        # A row is no longer than its table, whatever the step.
        max_context = table_width * block_size if window is None else min(table_width * block_size, window)
        splits = split_rows(num_rows, num_programs, cut, max_context=max_context)
        options = _decode_options(cut, heads, row_bytes, padded_value_dim)
        is_paired = bool(options["IS_AHEAD"]) and dtype.itemsize == 2 and key_dim % 2 == value_dim % 2 == 0
        numbers = {**common, **options, **_split_arguments(splits), "words": 2 if is_paired else 1, "PDL": pdl}
        if pdl:  # named only where it is wanted: the interpreter does not know it
            numbers["launch_pdl"] = True
        grid = (num_rows, num_programs, splits.num_layers)
        plans.append(_Plan(decode_kernel, grid, numbers, (num_heads, splits.max_splits, value_dim), is_paired))
    if not is_decode:
        tile_options = _tile_options(heads, row_bytes, dtype)
        # Rows and the padding after them start a tile each, wherever the one before ended.
        num_tiles = num_tokens // tile_options["tile_tokens"] + num_rows + 1
        numbers = {**common, **tile_options, "num_tokens": num_tokens}
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


def _invariant_plan(
    common: dict[str, Any],
    num_tokens: int,
    max_context: int,
    row_bytes: int,
    dtype: torch.dtype,
    window: int | None,
    *,
    pdl: bool,
) -> _Plan:
    """One kernel for all rows, in which nothing but how many programs share a row depends on the step."""
    heads, num_rows, value_dim = common["block_heads"], common["num_rows"], common["value_dim"]
    num_heads = common["num_kv_heads"] * common["group"]
    num_programs = common["num_kv_heads"] * common["head_blocks"]
    options = _tile_options(heads, row_bytes, dtype)
    if common["key_dim"] != common["padded_key_dim"] or value_dim != common["padded_value_dim"]:
        options["num_warps"] = 8  # masks of what is padded do not fit the registers of four
    # A window may begin and end within a share.
    most_seen = max_context if window is None else min(max_context, window + options["tile_keys"])
    max_shares = -(-most_seen // options["tile_keys"])
    num_parts = invariant_parts(
        num_rows, num_tokens, num_programs, max_shares, share_bytes=4 * num_heads * (value_dim + 2)
    )
    # Of the sums of so many shares, what fits 64 registers of each thread.
    most_heads = 32 * options["num_warps"] * 64 // (_SHARES_AT_ONCE * common["padded_value_dim"])
    numbers = {
        **common,
        **options,
        "max_shares": max_shares,
        "num_tokens": num_tokens,
        "heads_at_once": max(1, min(triton.next_power_of_2(heads), most_heads)),
        "shares_at_once": _SHARES_AT_ONCE,
        "PDL": pdl,
    }
    if pdl:  # as below
        numbers["launch_pdl"] = True
    num_tiles = num_tokens // options["tile_tokens"] + num_rows + 1
    scratch = (num_heads, max_shares if num_parts > 1 else 1, value_dim)
    return _Plan(invariant_kernel, (num_tiles, num_programs, num_parts), numbers, scratch)


def invariant_parts(num_rows: int, num_tokens: int, num_programs: int, max_shares: int, *, share_bytes: int) -> int:
    """Programs that may share a row of one token, a power of two: as many as run at a time if all rows have as many.

    num_programs: of a row that is not shared; share_bytes: of scratch, for each row and share.
    """
    if num_rows == 1 < num_tokens or num_rows * max_shares * share_bytes > _MAX_INVARIANT_BYTES:
        return 1
    num_parts = 1
    while num_parts < max_shares and 2 * num_parts * num_rows * num_programs <= INVARIANT_TOGETHER * MULTIPROCESSORS:
        num_parts *= 2
    return num_parts


def _split_arguments(splits: Splits) -> dict[str, int]:
    return {
        "even_bits": splits.num_even.bit_length() - 1,
        "split_bits": splits.max_splits.bit_length() - 1,
        "least_share": splits.least_share,
        "most_share": splits.most_share,
    }


def _cut(heads: int, row_bytes: int, dtype: torch.dtype, num_programs: int) -> Cut:
    """num_programs: of the step, without splits. Few choices, as each is a kernel of its own.

    Measured on an H200 for 128 elements of 16 bits; wider rows take fewer keys. A program of `_attend_ahead` has two tiles on
    their way in its registers. One head: large tiles where programs are so many that no more fit anyway, or so few that all of
    a short row should be on its way at once; in between twice as many small ones are faster. Grouped heads: tiles of few rows
    are loaded ahead, those of more rows go through shared memory.
    """
    if heads == 1:
        room = 4 * MULTIPROCESSORS
        if num_programs >= FULL_GRID:
            return Cut(32 if row_bytes <= 256 else 16, 2, 2, True, 4, 128)
        if num_programs * MAX_SPLITS // 2 <= room:
            return Cut(32 if row_bytes <= 256 else 16, 2, 2, True, 4, 32)
        return Cut(16, 2, 2, True, 8, 32, max_registers=128 if row_bytes <= 256 else None)
    is_ahead = num_programs <= FEW_GROUPS
    if dtype == torch.float32:  # multiplied outside the tensor cores, and out of registers
        return Cut(16, 8, 1, is_ahead, 2, 64)
    tile_keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    if is_ahead:
        return Cut(max(16, tile_keys // 2), 4, 1, True, 3, 64)
    return Cut(tile_keys, 4, 1, False, 4, 64)


def _decode_options(cut: Cut, heads: int, row_bytes: int, padded_value_dim: int) -> dict[str, int | None]:
    num_threads, splits_at_once = 32 * cut.num_warps, 16
    return {
        "IS_AHEAD": cut.is_ahead,
        "padded_heads": 1 if heads == 1 else max(16, triton.next_power_of_2(heads)),  # tl.dot takes 16 rows at least
        "tile_keys": cut.tile_keys,
        # As many keys as the threads can load in a round, or two, with 16 bytes each: a lane's keys are all its own threads'.
        "lanes": max(1, min(cut.tile_keys, cut.num_rounds * num_threads * 16 // row_bytes)),
        "splits_at_once": splits_at_once,
        # Of the sums of so many splits, what fits 64 registers of each thread.
        "heads_at_once": max(
            1, min(triton.next_power_of_2(heads), num_threads * 64 // (splits_at_once * padded_value_dim))
        ),
        "num_warps": cut.num_warps,
        "num_stages": 2,
        "maxnreg": cut.max_registers,
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
