"""Launches the Triton kernels of matrix products for 1 to 16 rows; what they give is defined in `few_rows.py`.

It is imported where there is no Triton, too; its kernels are not.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from hotgraph_server.kernels.again import launch, launch_as, launched_again
from hotgraph_server.kernels.few_rows_cuts import MAX_ROWS, MAX_SUM_ROWS, SumTuning, Tuning, tuned
from hotgraph_server.kernels.jit import next_power_of_two
from hotgraph_server.kernels.rope import RopePlan

_PDL: dict[bool, dict[str, bool]] = {False: {}, True: {"launch_pdl": True}}  # the interpreter does not know it


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
