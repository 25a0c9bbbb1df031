"""Root-mean-square normalisation. It knows vectors and their weight, not where in a model they stand."""

from __future__ import annotations

import functools

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x²) + epsilon)` over the last dimension; a new tensor.

    x: [..., n] of any float dtype; weight: [n], or any shape that broadcasts to x, of x's dtype. The mean is taken in
    float32, and the quotient is rounded to x's dtype before the weight is applied, as transformers does.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    if x.dtype != torch.float32:
        wide = x.float()
        return _normalised(wide, epsilon).to(x.dtype).mul_(weight)
    return _normalised(x, epsilon).mul_(weight)


def _normalised(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    # At one token the calls are the cost: this is the least number of them, 22 µs against 40 for the definition spelt out.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(_constant(epsilon, x.device), norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    return torch.mul(x, scale)


@functools.cache
def _constant(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)
