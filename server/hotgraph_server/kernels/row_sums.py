"""Sums over each row of a matrix in one order, whatever the number of rows: torch's own on a GPU depend on how many there are.

It knows numbers in rows, not what they mean. On the CPU it is plain torch, whose sums of a row do not.
"""

from __future__ import annotations

import torch

from hotgraph_server.kernels.again import launch
from hotgraph_server.kernels.jit import jit, tl

_BLOCK = 4096
_SCAN_BLOCK = 1024
_NUM_WARPS = 8


def row_logsumexp(x: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(x))) of each row, float32 [R], of float32 [R, V] with a finite largest number in each row."""
    return row_logsumexp_triton(x) if x.is_cuda else torch.logsumexp(x, dim=1)


def row_cumsum(x: torch.Tensor) -> torch.Tensor:
    """Running sums of each row, of x's shape and dtype. Numbers are not negative."""
    return row_cumsum_triton(x) if x.is_cuda else x.cumsum(1)


def row_logsumexp_triton(x: torch.Tensor) -> torch.Tensor:
    """`row_logsumexp` in one kernel. Rows may be apart, their numbers not."""
    assert x.stride(1) == 1, "rows of neighbours"
    out = x.new_empty(len(x))
    numbers = {"row_stride": x.stride(0), "size": x.shape[1], "block": _BLOCK, "num_warps": _NUM_WARPS}
    launch(_logsumexp_kernel, (len(x),), {"x": x, "out": out}, numbers)
    return out


def row_cumsum_triton(x: torch.Tensor) -> torch.Tensor:
    """`row_cumsum` in one kernel. x is copied first unless it is contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    numbers = {"size": x.shape[1], "block": _SCAN_BLOCK, "num_warps": _NUM_WARPS}
    launch(_cumsum_kernel, (len(x),), {"x": x, "out": out}, numbers)
    return out


@jit()
def _logsumexp_kernel(
    x: tl.tensor, out: tl.tensor, row_stride: tl.tensor, size: tl.constexpr, block: tl.constexpr
) -> None:
    """One program a row. The largest number needs no order, and each lane adds up every block-th number."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    highest = tl.full([block], float("-inf"), tl.float32)
    for first in tl.range(0, size, block):
        column = first + lane
        highest = tl.maximum(highest, tl.load(x + row * row_stride + column, mask=column < size, other=float("-inf")))
    top = tl.max(highest, axis=0)
    total = tl.zeros([block], tl.float32)
    for first in tl.range(0, size, block):
        column = first + lane
        total += tl.exp(tl.load(x + row * row_stride + column, mask=column < size, other=float("-inf")) - top)
    tl.store(out + row, top + tl.log(tl.sum(total, axis=0)))


@jit()
def _cumsum_kernel(x: tl.tensor, out: tl.tensor, size: tl.constexpr, block: tl.constexpr) -> None:
    """One program a row, a block after the other."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    before = tl.zeros([1], x.dtype.element_ty)
    for first in tl.range(0, size, block):
        column = first + lane
        sums = before + tl.cumsum(tl.load(x + row * size + column, mask=column < size, other=0.0), axis=0)
        tl.store(out + row * size + column, sums, mask=column < size)
        before = tl.max(sums, axis=0, keep_dims=True)
