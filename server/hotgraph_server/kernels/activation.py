"""The gated activation between a layer's two feed-forward products. It knows no weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
"""By their names in a transformers config."""


def gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`activation(gate) * up`: a new tensor, contiguous.

    gate_up: [T, 2n] of any float dtype, gate in the first n columns; the result is [T, n]. `activation` is a key of
    `ACTIVATIONS`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)
