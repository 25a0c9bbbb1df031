"""A decoder's layers and head for steps of few tokens, on a GPU: each product is one kernel with all that stands around it.

It knows the kernels of `kernels/few_rows.py` and which weights they take. The kernels overlap (programmatic dependent launch):
each requests weights while the one before still runs. So a layer is five kernels with attention, and up to nine: for more than
two tokens both norms have kernels of their own, heads that are normed, or turned in part, keep `rope_and_write_kv`, and rows of
several tokens beside rows of one have an attention kernel of their own.
"""

from __future__ import annotations

import torch

from hotgraph_server.kernels.few_rows import can_fuse_rope, few_rows_linear, few_rows_qkv, has_pdl
from hotgraph_server.models.arena import Activations
from hotgraph_server.models.layers import LayerInputs, Layers
from hotgraph_server.models.weights import DenseLinear, Linear

MAX_TOKENS = 8
"""Up to here they beat cuBLAS with kernels of their own for the rest: at the sizes of a 7B Llama in 16 bits on an H200, all
products of 32 layers took 3.05, 3.21, 3.67, 3.79 and 4.08 ms at 1, 2, 4, 8 and 16 tokens, instead of 3.84, 3.82, 3.86, 3.89 and
3.98."""


class FewRowsLayers(Layers):
    """See `Layers`. For up to MAX_TOKENS tokens and rows."""

    def __init__(self, layers: Layers, num_turned: int) -> None:
        """The same weights. num_turned: elements of a head that are turned."""
        super().__init__(layers.shape, layers.layers, layers.norm, layers.head)
        shape = self.shape
        self._fuses_rope = can_fuse_rope(shape.head_dim, num_turned, has_head_norm=shape.has_query_key_norm)

    @staticmethod
    def suit(layers: Layers) -> bool:
        """Whether the kernels know the device, the dtype and the sizes."""
        shape = layers.shape
        widths = (shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size)
        return (
            has_pdl(layers.norm.device)
            and layers.norm.dtype in {torch.float16, torch.bfloat16}
            and all(width % 16 == 0 for width in widths)
        )

    def enter(self, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """The embeddings: a product norms what it reads by itself."""
        return hidden

    def _queries(self, index: int, x: torch.Tensor, inputs: LayerInputs, at: Activations) -> torch.Tensor:
        layer, linear = self.layers[index], _dense(self.layers[index].qkv)
        if not self._fuses_rope:
            return self._turned(index, self._normed_product(linear, x, layer.attention_norm, at.qkv, at), inputs, at)
        return few_rows_qkv(
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
        self._add_product(self.layers[index].output, attended.flatten(1), hidden)
        return hidden

    def transform(self, index: int, x: torch.Tensor, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """The gated products of layer `index`, added to `hidden`, which is the next `x`."""
        layer = self.layers[index]
        gated = self._normed_product(layer.gate_up, x, layer.mlp_norm, at.gated, at, self.shape.activation)
        self._add_product(layer.down, gated, hidden)
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
        return few_rows_linear(
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

    def _add_product(self, linear: Linear, x: torch.Tensor, hidden: torch.Tensor) -> None:
        few_rows_linear(x, _dense(linear).weight, hidden, bias=_dense(linear).bias, residual=hidden, pdl=self._pdl)


def _dense(linear: Linear) -> DenseLinear:
    assert isinstance(linear, DenseLinear), "a weight as it is, which is what every GPU is given"
    return linear
