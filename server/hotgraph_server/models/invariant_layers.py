"""A decoder's layers and head for steps of any size in which a row's bits depend on no other row, on Hopper.

It knows the kernels whose sums have one order (`kernels/invariant_rows.py`, `kernels/attention_invariant.py`) and for which
models they are there; all the rest of a layer works on each row by itself anyway. Otherwise it is `tile_rows_layers.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from hotgraph_server.kernels.invariant_rows import invariant_linear, invariant_qkv
from hotgraph_server.kernels.tile_rows import runs_on
from hotgraph_server.kernels.tile_rows_triton import suits
from hotgraph_server.models.layers import Layers
from hotgraph_server.models.tile_rows_layers import TileRowsLayers
from hotgraph_server.models.weights import DenseLinear


class InvariantLayers(TileRowsLayers):
    """See `Layers`. For any number of tokens and rows."""

    is_invariant = True

    @staticmethod
    def fault(layers: Layers) -> str | None:
        """Why a model cannot be computed so, in words; None: it can."""
        device, dtype = layers.norm.device, layers.norm.dtype
        if not runs_on(device):
            return f"needs an NVIDIA GPU of compute capability 9 (Hopper: H100, H200), not {_name(device)}"
        if dtype not in {torch.float16, torch.bfloat16}:
            return f"needs model.dtype float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
        for linear in (*(linear for layer in layers.layers for linear in layer.linears), layers.head):
            if not isinstance(linear, DenseLinear) or not suits(linear.weight):
                size = "x".join(map(str, linear.weight.shape)) if isinstance(linear, DenseLinear) else "of another kind"
                return f"has no product for a weight {size}: its inputs are no multiple of 16"
        return None

    def _linear(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return invariant_linear(*arguments, **options)

    def _qkv(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return invariant_qkv(*arguments, **options)


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"
