"""A decoder's layers and head for steps of tens of tokens, on Hopper: each product is one kernel with what stands behind it.

It knows the kernels of `kernels/tile_rows.py` and which weights they take. As in `few_rows_layers.py` the kernels overlap, and
what one hands to the next is the sum itself; both norms of a layer have small kernels of their own.
"""

from __future__ import annotations

import torch

from hotgraph_server.kernels.tile_rows import can_fuse_rope, runs_on, tile_rows_linear, tile_rows_qkv
from hotgraph_server.kernels.tile_rows_cuts import MAX_ROWS
from hotgraph_server.kernels.tile_rows_triton import suits
from hotgraph_server.models.arena import Activations
from hotgraph_server.models.layers import LayerInputs, Layers
from hotgraph_server.models.weights import DenseLinear, Linear

MIN_TOKENS = 9  # below, the kernels for few rows are fewer
LARGE_MIN_TOKENS = 3
LARGE_LAYER_BYTES = 64 << 20
"""Of a layer whose time is its bytes and not its kernels. There these kernels win from 3 tokens on: at the sizes of a 7B Llama
in 16 bits on an H200 all products of 32 layers take 3.5 to 3.6 ms at up to 16 tokens, those for few rows 3.67 at 4 and 3.79 at
8."""


def least_tokens(layer_bytes: int) -> int:
    """Tokens of a step from which on these kernels are faster than those for few rows, by the bytes of a layer's weights."""
    return LARGE_MIN_TOKENS if layer_bytes >= LARGE_LAYER_BYTES else MIN_TOKENS


class TileRowsLayers(Layers):
    """See `Layers`. For up to `max_tokens` tokens and rows; `min_tokens` is where they begin to be faster."""

    max_tokens = MAX_ROWS

    def __init__(self, layers: Layers, num_turned: int) -> None:
        """The same weights. num_turned: elements of a head that are turned."""
        super().__init__(layers.shape, layers.layers, layers.norm, layers.head)
        shape = self.shape
        self._fuses_rope = can_fuse_rope(shape.head_dim, num_turned, has_head_norm=shape.has_query_key_norm)
        self.min_tokens = self._min_tokens()

    def _min_tokens(self) -> int:
        return least_tokens(sum(linear.num_bytes for linear in self.layers[0].linears))

    @staticmethod
    def suit(layers: Layers) -> bool:
        """Whether the kernels know the device and all weights."""
        linears = [*(linear for layer in layers.layers for linear in layer.linears), layers.head]
        return runs_on(layers.norm.device) and all(
            isinstance(linear, DenseLinear) and suits(linear.weight) for linear in linears
        )

    def enter(self, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """The embeddings: what a product reads is normed right before it."""
        return hidden

    def _queries(self, index: int, x: torch.Tensor, inputs: LayerInputs, at: Activations) -> torch.Tensor:
        layer, linear = self.layers[index], _dense(self.layers[index].qkv)
        if not self._fuses_rope:
            return self._turned(index, self._normed_product(linear, x, layer.attention_norm, at.qkv, at), inputs, at)
        return tile_rows_qkv(
            x,
            linear.weight,
            inputs.rope,
            inputs.kv_indices,
            inputs.kv.keys[index],
            inputs.kv.values[index],
            at.query,
            bias=linear.bias,
            norm=layer.attention_norm,
            epsilon=self.shape.norm_epsilon,
            normed=at.normed,
            pdl=self._pdl,
        )

    def join(self, index: int, attended: torch.Tensor, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """Adds what layer `index` attended to `hidden`, which is the `x` for `transform`."""
        self._add_product(self.layers[index].output, attended.flatten(1), hidden, at)
        return hidden

    def transform(self, index: int, x: torch.Tensor, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """The gated products of layer `index`, added to `hidden`, which is the next `x`."""
        layer = self.layers[index]
        gated = self._normed_product(layer.gate_up, x, layer.mlp_norm, at.gated, at, self.shape.activation)
        self._add_product(layer.down, gated, hidden, at)
        return hidden

    def logits(self, x: torch.Tensor, at: Activations, room: torch.Tensor | None) -> torch.Tensor:
        """See `Layers`."""
        logits = x.new_empty(len(x), self.shape.vocabulary_size, dtype=torch.float32) if room is None else room
        return self._normed_product(self.head, x, self.norm, logits, at)

    def _normed_product(
        self,
        linear: Linear,
        x: torch.Tensor,
        norm: torch.Tensor,
        out: torch.Tensor | None,
        at: Activations,
        activation: str | None = None,
    ) -> torch.Tensor:
        return tile_rows_linear(
            x,
            _dense(linear).weight,
            out,
            bias=_dense(linear).bias,
            norm=norm,
            epsilon=self.shape.norm_epsilon,
            normed=at.normed,
            activation=activation,
            pdl=self._pdl,
        )

    def _add_product(self, linear: Linear, x: torch.Tensor, hidden: torch.Tensor, at: Activations) -> None:
        tile_rows_linear(
            x,
            _dense(linear).weight,
            hidden,
            bias=_dense(linear).bias,
            residual=hidden,
            pdl=self._pdl,
        )


def _dense(linear: Linear) -> DenseLinear:
    assert isinstance(linear, DenseLinear), "a weight as it is, which is what every GPU is given"
    return linear
