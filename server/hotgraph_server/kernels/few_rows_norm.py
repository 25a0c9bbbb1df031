"""The Triton kernel that norms rows for the product behind it, as a link of a chain. Names as in `few_rows_parts.py`."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above


@triton.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def norm_kernel(
    out: tl.tensor,
    x: tl.tensor,
    norm: tl.tensor,
    epsilon: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """`norm.rms_norm`, one program a token, as a link of the chain."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    is_inside = column < K
    scale = tl.load(norm + column, mask=is_inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * K + column
    value = tl.load(x + place, mask=is_inside, other=0.0).to(tl.float32)
    quotient = value * tl.rsqrt(tl.sum(value * value, axis=0) / K + epsilon)
    # The product of two 16-bit floats is exact in float32, so this rounds as a product in 16 bits does.
    result = quotient.to(out.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + place, result.to(out.dtype.element_ty), mask=is_inside)
