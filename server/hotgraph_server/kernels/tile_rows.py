"""Matrix products whose sums have one order for any number of rows, with what stands behind them in a layer. It knows no model.

For more rows than `few_rows.py` takes the weights' bytes are still the time, but the rows no longer fit the registers that hold
loads in flight: here both come into shared memory by the copy engine of Hopper's multiprocessors, and their tensor cores read
them there. The gated activation, rope with the write to the cache, and the sum with the residual are done in the kernel of the
product; the norm before it has a small kernel of its own. A weight is [out, in] in rows, as `models/weights.py` keeps it.

Each sum is made by one program, over all columns from the first to the last. What the number of rows chooses, room for tokens,
tiles and the ring, does not touch that order. So a row has the same bits alone, beside any others, at any place, and with any
padding; `blas_rows.py` finds out for which numbers of rows cuBLAS gives them, faster.

The definition is that of `few_rows.py`, and on the CPU it is what runs; that promises nothing of bits. The kernel, in
`tile_rows_kernel.py`, runs on NVIDIA's GPUs of compute capability 9 alone, see `runs_on`, and takes weights that
`tile_rows_triton.suits` says.
"""

from __future__ import annotations

import torch

from hotgraph_server.kernels import few_rows
from hotgraph_server.kernels.few_rows import few_rows_qkv_reference, few_rows_reference
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.tile_rows_triton import tile_rows_linear_triton, tile_rows_qkv_triton


def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs there: on NVIDIA's GPUs of compute capability 9, which alone have its instructions."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def can_fuse_rope(head_dim: int, num_turned: int, *, has_head_norm: bool) -> bool:
    """Whether `tile_rows_qkv` knows such heads: turned whole, not normed, and of a multiple of 32 elements."""
    return few_rows.can_fuse_rope(head_dim, num_turned, has_head_norm=has_head_norm) and head_dim % 32 == 0


def tile_rows_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    normed: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    was_normed: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """y = x Wᵀ + bias for M rows, x normed before and y gated or added to the residual behind: `out`, or a new tensor.

    x: [M, in]; weight: [out, in], or with `activation` [2 * out, in], gates in the first half; bias: as many
    numbers as weight has rows; norm: [in], the weight of `rms_norm` with `epsilon`; activation: see `gated_activation`;
    residual: [M, out], which may be `out`, and then is updated in place; normed: [M, in], room for the normed x, overwritten.
    On a GPU: one 16-bit dtype, contiguous, a weight that `suits`, x from a multiple of 16 bytes on; `out` is no part of x and
    may be float32.

    Sums are float32 and each is made in one order: the same row gives the same bits, whatever the others are and however many.
    was_normed: a hint for the speed, that x was normed before, as all is but what O and down of a layer are given.

    With `pdl` the kernel starts while the one queued before still runs, and lets the one queued behind start too. It waits
    before it reads x or writes; weight and norm it reads without waiting, so no kernel in flight may write those.

    Bytes: 2 * weight.numel() from memory; x once a program, from the cache.
    """
    if x.is_cuda:
        return tile_rows_linear_triton(
            x,
            weight,
            out,
            bias=bias,
            norm=norm,
            epsilon=epsilon,
            normed=normed,
            activation=activation,
            residual=residual,
            was_normed=was_normed,
            pdl=pdl,
        )
    result = few_rows_reference(
        x, weight, bias=bias, norm=norm, epsilon=epsilon, activation=activation, residual=residual
    )
    return result if out is None else out.copy_(result)


def tile_rows_qkv(
    x: torch.Tensor,
    weight: torch.Tensor,
    rope: RopePlan,
    kv_indices: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    normed: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """`tile_rows_linear` and then `rope_and_write_kv`, in the kernel of the product: the turned queries, in `out` or new.

    weight: [(query heads + 2 * KV heads) * d, in]; out: [M, query heads, d]. Which heads: see `can_fuse_rope`. The rest is as
    in those two. Bytes: the weight's, and 2 * KV heads * d * M elements written to the cache.
    """
    if x.is_cuda:
        return tile_rows_qkv_triton(
            x,
            weight,
            rope,
            kv_indices,
            keys,
            values,
            out,
            bias=bias,
            norm=norm,
            epsilon=epsilon,
            normed=normed,
            pdl=pdl,
        )
    query = few_rows_qkv_reference(x, weight, rope, kv_indices, keys, values, bias=bias, norm=norm, epsilon=epsilon)
    return query if out is None else out.copy_(query)
