"""Weight matrices in the form that multiplies fastest on their device. It knows no model, only y = x Wᵀ + b.

How the form is chosen on the CPU. Measured on two cores of an EPYC with AVX2 (25 GB/s), float32, milliseconds for all
matrices of a 135M-parameter model at M tokens:

| M                                 | 1    | 2    | 4    | 8    | 16   | 64 (no head) |
| functional.linear (MKL)           | 33   | 71   | 69   | 69   | 60   | 124 |
| oneDNN, plain layout              | 20   | 35   | 36   | 44   | 54   | 93  |
| torch.mm(W, xᵀ)ᵀ (MKL)            | 35   | 23   | 23   | 41   | 53   | 95  |
| weights held as float16 (FBGEMM)  | 10.9 | 10.7 | 14.7 | 20.7 | 32.7 | 82  |

A step is bound by the bytes of the weights, and nearly every published checkpoint was stored in bfloat16 or float16: its
weights fit into float16 exactly once they are multiplied by a power of two. FBGEMM then multiplies them with float32
activations and float32 sums, so the result is a float32 product at half the traffic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

# Elements worked on at once while packing: below the size at which torch starts threads, since layers are packed in
# threads of their own; and small enough to stay in the second-level cache.
_CHUNK = 32_000

# The largest power of two that packed weights are scaled to: two under float16's limit of 65504.
_MAX_EXPONENT = 14

# What a weight may lose by packing, of the largest in its matrix: the rounding of one float32 sum.
_TOLERANCE = 2.0**-24


# Numbers of tokens at which MKL's other operand order wins. Not 7 nor above 8: there it is up to a third slower.
_TRANSPOSED_SIZES = frozenset({2, 3, 4, 5, 6, 8})


class Linear:
    """A matrix product, with the bias in it. The true result is that of the call times `scale`, a power of two.

    `scale` is 1 except for packed matrices. For those made with `scales_input` the caller multiplies the input by it
    beforehand (folded into a norm's weight it costs nothing), else the result (folded into the sum that follows).
    """

    scale: float = 1.0
    num_bytes: int = 0

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x: [M, in] → [M, out]: `out`, or a new tensor of x's dtype, which may be a transposed view.

        `out` is of x's dtype, or float32 where the weight is dense: then sums are not rounded, but on the CPU.
        """
        raise NotImplementedError


class DenseLinear(Linear):
    """The weight as it is: [out, in] and an optional bias [out], of the activations' dtype.

    On a GPU this is cuBLAS, as torch sets it up: float32 is multiplied in float32 (no TF32, torch's default); 16-bit dtypes are
    summed in float32, but where cuBLAS splits a sum among programs, torch's default lets it round the parts to 16 bits.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self._transposed = weight.t()
        self.bias = bias
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            return functional.linear(x, self.weight, self.bias)
        if out.dtype != x.dtype:
            if not x.is_cuda:  # torch has no such product there
                return out.copy_(self(x))
            torch.mm(x, self._transposed, out_dtype=out.dtype, out=out)
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is None:
            return torch.mm(x, self._transposed, out=out)
        return torch.addmm(self.bias, x, self._transposed, out=out)


class CpuLinear(DenseLinear):
    """float32 on the CPU, for weights that do not pack: the faster of two libraries by the number of tokens."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor
        if len(x) in _TRANSPOSED_SIZES:
            product = torch.mm(self.weight, x.t())
            result = product.t() if self.bias is None else product.add_(self.bias.unsqueeze(-1)).t()
        else:
            result = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return result if out is None else out.copy_(result)


class PackedLinear(Linear):
    """float32 activations, weights held as float16 times a power of two in FBGEMM's own order. See the module's table."""

    def __init__(self, scaled: torch.Tensor, bias: torch.Tensor | None, exponent: int, *, scales_input: bool) -> None:
        """scaled: the float32 weight times 2**exponent, which `packing_exponent` approved."""
        self.scale = 2.0**-exponent
        if bias is not None and not scales_input:
            bias = bias * 2.0**exponent
        self._packed = torch.ops.quantized.linear_prepack_fp16(scaled, bias)
        self._multiply = torch.ops.quantized.linear_dynamic_fp16.default
        self.num_bytes = scaled.numel() * 2 + (0 if bias is None else bias.nbytes)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = self._multiply(x, self._packed)
        return result if out is None else out.copy_(result)


def make_linear(
    parts: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    scales_input: bool,
    shares: bool = False,
) -> Linear:
    """One product for several matrices [out_i, in] over the same input, their outputs side by side.

    `biases` are [out_i], one for each part, or none. Copies, so that the parts may go; with `shares` a lone part that
    already has dtype and device is used as it is, and counts no bytes. See `Linear` for `scales_input`.
    """
    bias = torch.cat([b.to(device, dtype) for b in biases]) if biases else None
    is_plain_cpu = device.type == "cpu" and dtype == torch.float32
    if is_plain_cpu and can_pack():
        packed = _pack(parts, bias, scales_input)
        if packed is not None:
            return packed
    weight = parts[0] if shares else torch.cat([part.to(device, dtype) for part in parts])
    is_fast_cpu = is_plain_cpu and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    linear = CpuLinear(weight, bias) if is_fast_cpu else DenseLinear(weight, bias)
    if shares:
        linear.num_bytes = 0
    return linear


def can_pack() -> bool:
    """Whether this machine's torch has FBGEMM (x86 with AVX2)."""
    return torch.backends.quantized.engine in {"x86", "fbgemm"}


def _pack(parts: Sequence[torch.Tensor], bias: torch.Tensor | None, scales_input: bool) -> PackedLinear | None:
    """None when float16 would lose something of the weights."""
    flat_parts = [part.reshape(-1) for part in parts]
    largest = max((float(chunk.abs().max()) for part in flat_parts for chunk in torch.split(part, _CHUNK)), default=0.0)
    if not math.isfinite(largest):
        return None
    exponent = _MAX_EXPONENT - math.frexp(largest)[1] if largest > 0 else 0
    # Scaled in steps of normal numbers only: 2.0**exponent itself must be one in float32.
    if abs(exponent) > 100:
        return None
    scaled = torch.empty(sum(len(part) for part in parts), parts[0].shape[1], dtype=torch.float32)
    limit = _TOLERANCE * 2.0**_MAX_EXPONENT
    sizes = [len(chunk) for part in flat_parts for chunk in torch.split(part, _CHUNK)]
    chunks = iter(torch.split(scaled.view(-1), sizes))
    for part in flat_parts:
        for source in torch.split(part, _CHUNK):
            chunk = next(chunks)
            chunk.copy_(source).mul_(2.0**exponent)
            if float(chunk.half().float().sub_(chunk).abs_().max()) > limit:
                return None
    return PackedLinear(scaled, bias, exponent, scales_input=scales_input)
