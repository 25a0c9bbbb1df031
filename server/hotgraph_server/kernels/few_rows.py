"""Matrix products for 1 to 16 rows, with what stands before and behind them in a layer. It knows one product, no model.

A decode step reads all weights for few rows: their bytes are its time. So the norm before a product, the gated activation and
the sum with the residual behind it are done in the kernel of the product, and no matrix is copied or rearranged: a weight is
[out, in] in rows, as `models/weights.py` keeps it.

On the CPU this is plain torch, which is the reference; on a GPU (NVIDIA, compute capability 9.0 for programmatic dependent
launch) one kernel does the same for one or two rows, `few_rows_sums.py`, and another for more, `few_rows_dots.py`, for which
the norm has a kernel of its own, `few_rows_norm.py`.

Sources: programmatic dependent launch, CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; gated
units and the norm: see `activation.py` and `norm.py`.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from hotgraph_server.kernels.activation import gated_activation
from hotgraph_server.kernels.few_rows_cuts import Tuning
from hotgraph_server.kernels.few_rows_triton import few_rows_linear_triton, few_rows_qkv_triton
from hotgraph_server.kernels.norm import rms_norm
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.rope_kv import rope_and_write_kv


def has_pdl(device: torch.device) -> bool:
    """Whether kernels there may be launched with `pdl`: NVIDIA's GPUs of compute capability 9.0 and above."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def few_rows_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of `few_rows_linear`, in plain torch: a new tensor."""
    normed = x if norm is None else rms_norm(x, norm, epsilon)
    wide_bias = None if bias is None else bias.float()
    product = functional.linear(normed.float(), weight.float(), wide_bias).to(x.dtype)
    if activation is not None:
        product = gated_activation(product, activation)
    return product if residual is None else residual + product


def few_rows_linear(
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
    pdl: bool = False,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """y = x Wᵀ + bias for M rows, x normed before and y gated or added to the residual behind: `out`, or a new tensor.

    x: [M, in], M from 1 to 16; weight: [out, in], or with `activation` [2 * out, in], gates in the first half; bias: as many
    numbers as weight has rows; norm: [in], the weight of `rms_norm` with `epsilon`; activation: see `gated_activation`;
    residual: [M, out], which may be `out`, and then is updated in place; normed: [M, in], room for the normed x, overwritten
    if M > 2, else untouched. On a GPU: one 16-bit dtype, contiguous, `in` a multiple of 16; `out` is no part of x and may be
    float32.

    Sums are float32 and each is made in one program in one order: the same input gives the same bits. A row's do not depend on
    the other rows, only on whether there are one, two, up to 8 or up to 16.

    With `pdl` the kernel starts while the one queued before still runs, and lets the one queued behind start too. It waits
    before it reads x or writes; weight, bias and norm it reads without waiting, so no kernel in flight may write those.

    tuning: how the kernel is cut up, for this number of rows; None: as `tuned` says. The CPU does not ask.

    Bytes: 2 * weight.numel() from memory; x once a program, from the cache.
    """
    if x.is_cuda:
        return few_rows_linear_triton(
            x,
            weight,
            out,
            bias=bias,
            norm=norm,
            epsilon=epsilon,
            normed=normed,
            activation=activation,
            residual=residual,
            pdl=pdl,
            tuning=tuning,
        )
    result = few_rows_reference(
        x, weight, bias=bias, norm=norm, epsilon=epsilon, activation=activation, residual=residual
    )
    return result if out is None else out.copy_(result)


def few_rows_qkv_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    rope: RopePlan,
    kv_indices: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """The definition of `few_rows_qkv`, in plain torch: new queries, and keys and values written."""
    qkv = few_rows_reference(x, weight, bias=bias, norm=norm, epsilon=epsilon)
    return rope_and_write_kv(qkv, rope, kv_indices, keys, values)


def few_rows_qkv(
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
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """`few_rows_linear` and then `rope_and_write_kv`, in the kernel of the product: the turned queries, in `out` or new.

    weight: [(query heads + 2 * KV heads) * d, in]; out: [M, query heads, d]. Heads are turned whole and not normed: see
    `can_fuse_rope`. The rest is as in those two. Bytes: the weight's, and 2 * KV heads * d * M elements written to the cache.
    """
    if x.is_cuda:
        return few_rows_qkv_triton(
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
            tuning=tuning,
        )
    query = few_rows_qkv_reference(x, weight, rope, kv_indices, keys, values, bias=bias, norm=norm, epsilon=epsilon)
    return query if out is None else out.copy_(query)


def can_fuse_rope(head_dim: int, num_turned: int, *, has_head_norm: bool) -> bool:
    """Whether `few_rows_qkv` knows such heads: `num_turned` of their `head_dim` elements are turned."""
    return num_turned == head_dim and not has_head_norm
