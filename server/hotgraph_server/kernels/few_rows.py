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

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch.nn import functional

from hotgraph_server.kernels.activation import gated_activation
from hotgraph_server.kernels.again import launch, launch_as, launched_again
from hotgraph_server.kernels.jit import next_power_of_two
from hotgraph_server.kernels.norm import rms_norm
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.rope_kv import rope_and_write_kv

MAX_ROWS = 16
MAX_SUM_ROWS = 2
"""Rows up to which ordinary multiplications keep up with the memory; above, tensor cores take eight rows or 16 at a time."""


@dataclass(frozen=True, slots=True)
class SumTuning:
    """How a product of one or two rows is cut up.

    block_rows: of the weight, a program; tile: columns loaded at once, 8 at least; both are powers of two. ahead: tiles that
    are requested before the wait and kept in flight.
    """

    block_rows: int
    tile: int
    num_warps: int
    ahead: int = 1
    triggers_late: bool = False


@dataclass(frozen=True, slots=True)
class DotTuning:
    """How a product of 3 to 16 rows is cut up.

    block_rows of the weight a program, 16 or a larger power of two; parts: stretches of 32 columns that a warp loads at once, a
    power of two; ahead, tokens_ahead: tiles of the weight and of x in flight, a tile being 32 * parts * num_warps columns.
    """

    block_rows: int
    parts: int
    num_warps: int
    ahead: int
    tokens_ahead: int
    triggers_late: bool = False


Tuning: TypeAlias = SumTuning | DotTuning

ROW_CLASSES = (1, 2, 8, 16)
"""There is a kernel for one row, one for two, one for up to 8 and one for up to 16, and a tuning for each."""

# For one row, for two, for up to 8, for up to 16. What follows the QKV product is let start only after that one's own wait:
# attention then knows that older keys are complete, and reads them before its own.
_BEST: dict[str, tuple[SumTuning, SumTuning, DotTuning, DotTuning]] = {
    "qkv": (
        SumTuning(4, 4096, num_warps=4, ahead=1, triggers_late=True),
        SumTuning(4, 2048, num_warps=4, ahead=1, triggers_late=True),
        DotTuning(16, parts=2, num_warps=2, ahead=6, tokens_ahead=2, triggers_late=True),
        DotTuning(32, parts=2, num_warps=2, ahead=3, tokens_ahead=2, triggers_late=True),
    ),
    "o": (
        SumTuning(8, 2048, num_warps=4, ahead=1),
        SumTuning(4, 2048, num_warps=4, ahead=2),
        DotTuning(32, parts=1, num_warps=8, ahead=6, tokens_ahead=2),
        DotTuning(16, parts=4, num_warps=4, ahead=2, tokens_ahead=2),
    ),
    "gate_up": (
        SumTuning(4, 4096, num_warps=4, ahead=1),
        SumTuning(4, 2048, num_warps=4, ahead=2),
        DotTuning(16, parts=2, num_warps=4, ahead=6, tokens_ahead=2),
        DotTuning(16, parts=4, num_warps=2, ahead=2, tokens_ahead=2),
    ),
    "down": (
        SumTuning(4, 2048, num_warps=8, ahead=3),
        SumTuning(8, 2048, num_warps=4, ahead=2),
        DotTuning(16, parts=4, num_warps=8, ahead=2, tokens_ahead=2),
        DotTuning(16, parts=4, num_warps=4, ahead=2, tokens_ahead=2),
    ),
}
_PDL: dict[bool, dict[str, bool]] = {False: {}, True: {"launch_pdl": True}}  # the interpreter does not know it
# Programs from which on there is one for each of the 132 multiprocessors of an H200, or nearly.
_FEW_PROGRAMS = 128


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


def few_rows_linear_triton(
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
    """`few_rows_linear` in Triton's kernels. `tuning` is a SumTuning for one or two rows, else a DotTuning."""
    num_outputs = weight.shape[0] if activation is None else weight.shape[0] // 2
    if out is None:
        out = x.new_empty(len(x), num_outputs)
    _launch(
        _Product(x, weight, out, bias, norm, epsilon, normed, pdl),
        tuning or tuned(len(x), *weight.shape, is_gated=activation is not None, is_normed=norm is not None),
        residual=residual,
        positions=None,
        kv_indices=None,
        table=None,
        keys=None,
        values=None,
        ACTIVATION="silu" if activation == "swish" else activation,
        DISTANCE=0 if activation is None else num_outputs,
        NUM_KV_HEADS=0,
        HEAD_DIM=0,
    )
    return out


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


def few_rows_qkv_triton(
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
    """`few_rows_qkv` in Triton's kernels. `tuning` as in `few_rows_linear_triton`."""
    num_kv_heads, head_dim = keys.shape[2:]
    assert keys.is_contiguous(), "the cache is contiguous"
    assert values.is_contiguous(), "the cache is contiguous"
    assert rope.table.shape[1] == head_dim, "heads are turned whole"
    if out is None:
        out = x.new_empty(len(x), len(weight) // head_dim - 2 * num_kv_heads, head_dim)
    _launch(
        _Product(x, weight, out, bias, norm, epsilon, normed, pdl),
        tuning or tuned(len(x), *weight.shape, is_gated=False, is_normed=norm is not None),
        residual=None,
        positions=rope.positions,
        kv_indices=kv_indices,
        table=rope.table,
        keys=keys,
        values=values,
        ACTIVATION=None,
        DISTANCE=head_dim // 2,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
    )
    return out


@dataclass(frozen=True, slots=True)
class _Product:
    """What all products are given; see `few_rows_linear`."""

    x: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor
    bias: torch.Tensor | None
    norm: torch.Tensor | None
    epsilon: float
    normed: torch.Tensor | None
    pdl: bool


def normed_triton(
    x: torch.Tensor, norm: torch.Tensor, epsilon: float, out: torch.Tensor | None, *, pdl: bool
) -> torch.Tensor:
    """`norm.rms_norm` as a link of a chain, in `out` or new: what products that do not norm themselves are given."""
    # Torch for the CPU alone comes without Triton; so below.
    from hotgraph_server.kernels.few_rows_norm import norm_kernel

    out = torch.empty_like(x) if out is None else out
    assert x.is_contiguous(), "x is contiguous"
    num_rows, num_inputs = x.shape
    block = next_power_of_two(num_inputs)
    numbers = {"epsilon": epsilon, "K": num_inputs, "BLOCK": block, "PDL": pdl}
    options = {"num_warps": min(max(block // 512, 1), 16), **_PDL[pdl]}
    launch(norm_kernel, (num_rows,), {"out": out, "x": x, "norm": norm}, {**numbers, **options})
    return out


def _launch(
    product: _Product,
    tuning: Tuning,
    *,
    residual: torch.Tensor | None,
    positions: torch.Tensor | None,
    kv_indices: torch.Tensor | None,
    table: torch.Tensor | None,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    **epilogue: Hashable,
) -> None:
    x, weight = product.x, product.weight
    norm = product.norm
    if not isinstance(tuning, SumTuning) and norm is not None:
        x, norm = normed_triton(x, norm, product.epsilon, product.normed, pdl=product.pdl), None
    tensors = {
        "out": product.out,
        "x": x,
        "weight": weight,
        "bias": product.bias,
        "norm": norm,
        "residual": residual,
        "positions": positions,
        "kv_indices": kv_indices,
        "table": table,
        "keys": keys,
        "values": values,
    }
    key = ("few", x.shape, weight.shape, tuning, product.pdl, product.epsilon, *epilogue.values())
    if launched_again(key, tensors):
        return
    from hotgraph_server.kernels.few_rows_dots import dots_kernel
    from hotgraph_server.kernels.few_rows_sums import sums_kernel

    num_rows, num_inputs = x.shape
    assert 1 <= num_rows <= MAX_ROWS, "few rows"
    assert weight.is_contiguous(), "a weight as `make_linear` has it"
    assert x.is_contiguous(), "x is contiguous"
    assert product.out.is_contiguous(), "the result is contiguous"
    assert num_inputs % 16 == 0, "loads of 16 bytes"
    assert x.element_size() == weight.element_size() == 2, "16 bits"
    options = {
        **epilogue,
        **_PDL[product.pdl],
        "N": len(weight),
        "K": num_inputs,
        "BLOCK_ROWS": tuning.block_rows,
        "AHEAD": tuning.ahead,
        "PDL": product.pdl,
        "TRIGGERS_LATE": tuning.triggers_late,
        "num_warps": tuning.num_warps,
        "num_stages": 1,  # loads are requested by hand
    }
    grid = (-(-len(weight) // tuning.block_rows),)
    if isinstance(tuning, SumTuning):
        assert num_rows <= MAX_SUM_ROWS, "a tuning for more rows"
        sizes = {"epsilon": product.epsilon, "TOKENS": num_rows, "TILE": tuning.tile}
        launch_as(key, sums_kernel, grid, tensors, {**tensors, **sizes, **options})
        return
    own: dict[str, object] = {
        "x": x.view(torch.int32),
        "weight": weight.view(torch.int32),
        "num_tokens": num_rows,
        "TOKEN_HALVES": 1 if num_rows <= 8 else 2,
        "PARTS": tuning.parts,
        "WARPS": tuning.num_warps,
        "TOKENS_AHEAD": tuning.tokens_ahead,
        "IS_BFLOAT16": x.dtype == torch.bfloat16,
    }
    arguments = {**tensors, **own, **options}
    del arguments["norm"]  # this kernel has none
    launch_as(key, dots_kernel, grid, tensors, arguments)


def row_class(num_rows: int) -> int:
    """The one of ROW_CLASSES whose kernel serves so many rows."""
    assert 1 <= num_rows <= MAX_ROWS, "few rows"
    return next(largest for largest in ROW_CLASSES if num_rows <= largest)


def tuned(num_rows: int, num_weight_rows: int, num_inputs: int, *, is_gated: bool, is_normed: bool) -> Tuning:
    """What a product is cut into: the best found on an H200 for the product of a 7B Llama that it is most like.

    There are four kernels for each weight: for one row, for two, up to 8 and up to 16. A head is taken for queries, keys and
    values: it triggers late, which nobody behind it minds. This is the rule for shapes that nobody has measured; for those that
    somebody has see `tuning.py`.
    """
    name = "gate_up" if is_gated else "qkv" if is_normed else "down" if num_inputs > 8192 else "o"
    tuning = _BEST[name][ROW_CLASSES.index(row_class(num_rows))]
    if isinstance(tuning, SumTuning):
        # Small models: a thread takes eight neighbours, and more threads than that have nothing to do.
        tile = min(tuning.tile, max(next_power_of_two(num_inputs), 256))
        return replace(tuning, tile=tile, num_warps=min(tuning.num_warps, tile // 256))
    # Small models: few programs take fewer rows each, and no tile is requested that lies beyond the weight.
    block_rows = 16 if num_weight_rows < tuning.block_rows * _FEW_PROGRAMS else tuning.block_rows
    ahead = min(tuning.ahead, -(-num_inputs // (32 * tuning.parts * tuning.num_warps)))
    return replace(tuning, block_rows=block_rows, ahead=ahead, tokens_ahead=min(tuning.tokens_ahead, ahead))
