"""A decoder's layers and head for steps of any size in which a row's bits depend on no other row, on Hopper.

It knows the kernels whose sums have one order (`kernels/tile_rows.py`, `kernels/attention_invariant.py`) and for which
models they are there. Short steps are those of `tile_rows_layers.py`, long ones those of `layers.py`, each with such products:
all the rest of a layer works on each row by itself anyway, and rounds in the same places.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hotgraph_server.kernels.blas_rows import MIN_ROWS, equal_rows
from hotgraph_server.kernels.tile_rows import runs_on, tile_rows_linear
from hotgraph_server.kernels.tile_rows_triton import suits
from hotgraph_server.models.layers import Layer, Layers
from hotgraph_server.models.tile_rows_layers import TileRowsLayers
from hotgraph_server.models.weights import DenseLinear, Linear


class InvariantLinear(DenseLinear):
    """The weight of another, multiplied in the order of `tile_rows.py`: by cuBLAS where that was seen to give its bits."""

    def __init__(self, linear: Linear, *, was_normed: bool) -> None:
        """was_normed: what it is given was normed before."""
        assert isinstance(linear, DenseLinear), "a weight as it is, which is what every GPU is given"
        super().__init__(linear.weight, linear.bias)
        self._was_normed = was_normed
        self._equal_rows: frozenset[int] = frozenset()

    def try_out(self, max_rows: int) -> None:
        """From now on cuBLAS takes what it can; see `equal_rows`. Products with a bias stay where they are."""
        if self.bias is None:
            self._equal_rows |= equal_rows(self.weight, max_rows, was_normed=self._was_normed)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if len(x) in self._equal_rows and (out is None or out.dtype == x.dtype):
            return super().__call__(x, out)
        return tile_rows_linear(x, self.weight, out, bias=self.bias, was_normed=self._was_normed)


class InvariantLayers(Layers):
    """See `Layers`. For any number of tokens and rows."""

    is_invariant = True

    def __init__(self, layers: Layers) -> None:
        """The same weights."""
        super().__init__(
            layers.shape,
            [_with_products(layer) for layer in layers.layers],
            layers.norm,
            InvariantLinear(layers.head, was_normed=True),
        )

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

    def try_out(self, max_tokens: int) -> None:
        """Sees where cuBLAS can be taken in steps of up to so many tokens: some hundred products on the device, once."""
        for linear in (linear for layer in self.layers for linear in layer.linears):
            assert isinstance(linear, InvariantLinear)
            linear.try_out(max_tokens)


class ShortInvariantLayers(TileRowsLayers):
    """See `Layers`. For steps whose tokens a program has room for: the same bits as those of `InvariantLayers`."""

    is_invariant = True
    max_tokens = MIN_ROWS - 1

    def _min_tokens(self) -> int:
        return 1


def _with_products(layer: Layer) -> Layer:
    return replace(
        layer,
        qkv=InvariantLinear(layer.qkv, was_normed=True),
        output=InvariantLinear(layer.output, was_normed=False),
        gate_up=InvariantLinear(layer.gate_up, was_normed=True),
        down=InvariantLinear(layer.down, was_normed=False),
    )


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"
