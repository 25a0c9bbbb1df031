"""Decode: how each row's keys are split in shares, worked out on the device, which alone knows lengths. It reads no key.

How many shares there may be, `attention_cuts.Splits` says, for the whole step.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above

_SHARE_UNIT = tl.constexpr(16)  # keys; a share is a multiple of it
_ROWS_AT_ONCE = tl.constexpr(64)  # rows looked at together when a share is looked for


@triton.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def shares(
    num_seen: tl.tensor, even_bits: tl.tensor, split_bits: tl.tensor, least_share: tl.tensor, most_share: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Keys of a share, and shares that have any, of rows that see so many: see `attention_cuts.Splits`."""
    even = ((num_seen + (1 << even_bits) - 1) >> even_bits) + _SHARE_UNIT - 1
    fewest = ((num_seen + (1 << split_bits) - 1) >> split_bits) + _SHARE_UNIT - 1
    keys = tl.maximum(tl.minimum(tl.maximum(even, least_share), most_share), fewest)
    keys = keys // _SHARE_UNIT * _SHARE_UNIT
    return keys, tl.cdiv(num_seen, keys)


@triton.jit  # type: ignore[untyped-decorator]
def find_share(
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
        _, num_used = shares(num_seen, even_bits, split_bits, least_share, most_share)
        beyond = tl.maximum(num_used - (1 << even_bits), 0)
        is_before = is_row & (num_shares + tl.cumsum(beyond, axis=0) <= number)
        num_before += tl.sum(is_before.to(tl.int32), axis=0)
        first_number += tl.sum(tl.where(is_before, beyond, 0), axis=0)
        num_shares += tl.sum(beyond, axis=0)
    return num_before, (1 << even_bits) + number - first_number, num_shares
