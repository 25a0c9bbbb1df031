"""Launches the Triton kernels of matrix products for 1 to 16 rows; what they give is defined in `few_rows.py`.

It is imported where there is no Triton, too; its kernels are not.
"""

from __future__ import annotations

import torch

from hotgraph_server.kernels.again import launch, launch_as, launched_again
from hotgraph_server.kernels.epilogue import PDL_OPTIONS, Epilogue, heads_epilogue, linear_epilogue, num_outputs_of
from hotgraph_server.kernels.few_rows_cuts import MAX_ROWS, MAX_SUM_ROWS, SumTuning, Tuning, tuned
from hotgraph_server.kernels.jit import next_power_of_two
from hotgraph_server.kernels.rope import RopePlan


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
    epilogue = linear_epilogue(weight, activation, residual)
    if out is None:
        out = x.new_empty(len(x), num_outputs_of(weight, activation))
    if tuning is None:
        tuning = tuned(len(x), *weight.shape, is_gated=activation is not None, is_normed=norm is not None)
    _launch(x, weight, out, bias, norm, epsilon, normed, epilogue, tuning, pdl=pdl)
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
    epilogue = heads_epilogue(rope, kv_indices, keys, values)
    if out is None:
        num_kv_heads, head_dim = keys.shape[2:]
        out = x.new_empty(len(x), len(weight) // head_dim - 2 * num_kv_heads, head_dim)
    if tuning is None:
        tuning = tuned(len(x), *weight.shape, is_gated=False, is_normed=norm is not None)
    _launch(x, weight, out, bias, norm, epsilon, normed, epilogue, tuning, pdl=pdl)
    return out


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
    options = {"num_warps": min(max(block // 512, 1), 16), **PDL_OPTIONS[pdl]}
    launch(norm_kernel, (num_rows,), {"out": out, "x": x, "norm": norm}, {**numbers, **options})
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    epsilon: float,
    normed: torch.Tensor | None,
    epilogue: Epilogue,
    tuning: Tuning,
    *,
    pdl: bool,
) -> None:
    if norm is not None and not isinstance(tuning, SumTuning):
        x, norm = normed_triton(x, norm, epsilon, normed, pdl=pdl), None
    tensors = {"out": out, "x": x, "weight": weight, "bias": bias, "norm": norm, **epilogue.tensors}
    key = ("few", x.shape, weight.shape, tuning, pdl, epsilon, *epilogue.constants.values())
    if launched_again(key, tensors):
        return
    from hotgraph_server.kernels.few_rows_dots import dots_kernel
    from hotgraph_server.kernels.few_rows_sums import sums_kernel

    num_rows, num_inputs = x.shape
    assert 1 <= num_rows <= MAX_ROWS, "few rows"
    assert weight.is_contiguous(), "a weight as `make_linear` has it"
    assert x.is_contiguous(), "x is contiguous"
    assert out.is_contiguous(), "the result is contiguous"
    assert num_inputs % 16 == 0, "loads of 16 bytes"
    assert x.element_size() == weight.element_size() == 2, "16 bits"
    options = {
        **epilogue.constants,
        **PDL_OPTIONS[pdl],
        "N": len(weight),
        "K": num_inputs,
        "BLOCK_ROWS": tuning.block_rows,
        "AHEAD": tuning.ahead,
        "PDL": pdl,
        "TRIGGERS_LATE": tuning.triggers_late,
        "num_warps": tuning.num_warps,
        "num_stages": 1,  # loads are requested by hand
    }
    grid = (-(-len(weight) // tuning.block_rows),)
    if isinstance(tuning, SumTuning):
        assert num_rows <= MAX_SUM_ROWS, "a tuning for more rows"
        sizes = {"epsilon": epsilon, "TOKENS": num_rows, "TILE": tuning.tile}
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
