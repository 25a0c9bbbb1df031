"""A decoder's layers and head for steps of few tokens, on a GPU: each product is one kernel with all that stands around it.

It knows the kernels of `kernels/few_rows.py`, which weights they take, and who knows how each product is cut up
(`kernels/tuning.py`). The kernels overlap (programmatic dependent launch): each requests weights while the one before still
runs. So a layer is five kernels with attention, and up to nine: for more than two tokens both norms have kernels of their own,
heads that are normed, or turned in part, keep `rope_and_write_kv`, and rows of several tokens beside rows of one have an
attention kernel of their own.
"""

from __future__ import annotations

import logging

import torch

from hotgraph_server.kernels.few_rows import can_fuse_rope, few_rows_linear, few_rows_qkv, has_pdl
from hotgraph_server.kernels.tuning import NO_TUNINGS, ChainShape, Tunings, TuningTable
from hotgraph_server.models.arena import Activations
from hotgraph_server.models.layers import LayerInputs, Layers
from hotgraph_server.models.shape import DecoderShape
from hotgraph_server.models.weights import DenseLinear, Linear

MAX_TOKENS = 8
"""Up to here they beat cuBLAS with kernels of their own for the rest: at the sizes of a 7B Llama in 16 bits on an H200, all
products of 32 layers took 3.05, 3.21, 3.67, 3.79 and 4.08 ms at 1, 2, 4, 8 and 16 tokens, instead of 3.84, 3.82, 3.86, 3.89 and
3.98."""


logger = logging.getLogger("hotgraph.models")


def chain_shape(shape: DecoderShape, dtype: torch.dtype, num_turned: int) -> ChainShape:
    """The sizes of a decoder's products. num_turned: elements of a head that are turned."""
    return ChainShape(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocabulary_size=shape.vocabulary_size,
        num_layers=shape.num_layers,
        activation=shape.activation,
        dtype=dtype,
        fuses_rope=can_fuse_rope(shape.head_dim, num_turned, has_head_norm=shape.has_query_key_norm),
    )


def can_take(shape: DecoderShape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels know the device, the dtype and the sizes."""
    widths = (shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size)
    return has_pdl(device) and dtype in {torch.float16, torch.bfloat16} and all(width % 16 == 0 for width in widths)


class FewRowsLayers(Layers):
    """See `Layers`. For up to MAX_TOKENS tokens and rows."""

    def __init__(self, layers: Layers, num_turned: int, table: TuningTable = NO_TUNINGS) -> None:
        """The same weights. num_turned: elements of a head that are turned; table: how products are cut up."""
        super().__init__(layers.shape, layers.layers, layers.norm, layers.head)
        chain = chain_shape(self.shape, self.norm.dtype, num_turned)
        self._fuses_rope = chain.fuses_rope
        self._tunings = {name: table.tunings_of(product) for name, product in chain.products.items()}
        measured = {product for product, _ in table.measured}
        num_measured = sum(product in measured for product in chain.products.values())
        logger.info(
            "products of few rows: %d of %d are cut up as measured%s",
            num_measured,
            len(chain.products),
            f" ({table.source})" if num_measured else "; hotgraph tune measures them",
        )

    @staticmethod
    def suit(layers: Layers) -> bool:
        """See `can_take`."""
        return can_take(layers.shape, layers.norm.dtype, layers.norm.device)

    def enter(self, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """The embeddings: a product norms what it reads by itself."""
        return hidden

    def _queries(self, index: int, x: torch.Tensor, inputs: LayerInputs, at: Activations) -> torch.Tensor:
        layer, linear = self.layers[index], _dense(self.layers[index].qkv)
        if not self._fuses_rope:
            qkv = self._normed_product(linear, x, layer.attention_norm, at.qkv, at, self._tunings["qkv"])
            return self._turned(index, qkv, inputs, at)
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
            tuning=self._tunings["qkv"][len(x)],
        )

    def join(self, index: int, attended: torch.Tensor, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """Adds what layer `index` attended to `hidden`, which is the `x` for `transform`."""
        self._add_product(self.layers[index].output, attended.flatten(1), hidden, self._tunings["output"])
        return hidden

    def transform(self, index: int, x: torch.Tensor, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """The gated products of layer `index`, added to `hidden`, which is the next `x`."""
        layer = self.layers[index]
        gated = self._normed_product(
            layer.gate_up, x, layer.mlp_norm, at.gated, at, self._tunings["gate_up"], self.shape.activation
        )
        self._add_product(layer.down, gated, hidden, self._tunings["down"])
        return hidden

    def logits(self, x: torch.Tensor, at: Activations, room: torch.Tensor | None) -> torch.Tensor:
        """See `Layers`."""
        logits = x.new_empty(len(x), self.shape.vocabulary_size, dtype=torch.float32) if room is None else room
        return self._normed_product(self.head, x, self.norm, logits, at, self._tunings["head"])

    def _normed_product(
        self,
        linear: Linear,
        x: torch.Tensor,
        norm: torch.Tensor,
        out: torch.Tensor | None,
        at: Activations,
        tunings: Tunings,
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
            tuning=tunings[len(x)],
        )

    def _add_product(self, linear: Linear, x: torch.Tensor, hidden: torch.Tensor, tunings: Tunings) -> None:
        few_rows_linear(
            x,
            _dense(linear).weight,
            hidden,
            bias=_dense(linear).bias,
            residual=hidden,
            pdl=self._pdl,
            tuning=tunings[len(x)],
        )


def _dense(linear: Linear) -> DenseLinear:
    assert isinstance(linear, DenseLinear), "a weight as it is, which is what every GPU is given"
    return linear
