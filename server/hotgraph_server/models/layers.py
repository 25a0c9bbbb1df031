"""A decoder's layers and head: their weights, and how a step of any size goes through them, one kernel after the other.

It knows kernels and weights, neither steps nor their lengths; `decoder.py` leads a step through. `few_rows_layers.py` does the
same for steps of few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hotgraph_server.kernels.activation import gated_activation
from hotgraph_server.kernels.attention import AttentionPlan, paged_attention
from hotgraph_server.kernels.few_rows import has_pdl
from hotgraph_server.kernels.norm import add_rms_norm, rms_norm
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.rope_kv import rope_and_write_kv
from hotgraph_server.models.arena import Activations
from hotgraph_server.models.device_rates import KERNEL_SECONDS, DeviceRates
from hotgraph_server.models.interface import KvTensors
from hotgraph_server.models.shape import DecoderShape
from hotgraph_server.models.weights import Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights. Norm weights carry the scale of the product that follows them (see `weights.Linear`)."""

    attention_norm: torch.Tensor
    qkv: Linear
    query_key_norm: torch.Tensor | None  # [query heads + KV heads, head_dim]
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    window: int | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All its products."""
        return (self.qkv, self.output, self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What all layers of a step are given. kv_indices: as in `StepTensors`."""

    kv: KvTensors
    kv_indices: torch.Tensor
    attention: AttentionPlan
    rope: RopePlan


class Layers:
    """A step goes through `enter`, then for each layer through `attend`, `join` and `transform`, then through `logits`.

    What one hands to the next is `x`, [T, hidden]: here the normed sum, in `few_rows_layers.py` the sum itself. `hidden`,
    [T, hidden], is that sum, and is updated in place. `at` says where results go. Between `attend` and `join` of the last
    layer the caller may leave tokens out, and `at` may change with them.
    """

    is_invariant = False  # whether a token's bits depend on no other row: see `invariant_layers.py`

    def __init__(self, shape: DecoderShape, layers: Sequence[Layer], norm: torch.Tensor, head: Linear) -> None:
        """norm: the last one's weight, [hidden]; head: to the vocabulary."""
        self.shape = shape
        self.layers = layers
        self.norm = norm
        self.head = head
        # What the sum after each layer is normed with: the weight of the layer that follows, or of the head.
        self._next_norms = [*(layer.attention_norm for layer in layers[1:]), norm]
        self._scaling = shape.head_dim**-0.5
        self._pdl = has_pdl(norm.device)
        self._rates = DeviceRates.of(norm.device)

    def enter(self, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """The first `x`, of the tokens' embeddings."""
        return rms_norm(hidden, self.layers[0].attention_norm, self.shape.norm_epsilon, at.normed)

    def attend(self, index: int, x: torch.Tensor, inputs: LayerInputs, at: Activations) -> torch.Tensor:
        """Writes layer `index`'s keys and values, and gives what its attention gives: [T, query heads, d]."""
        query = self._queries(index, x, inputs, at)
        return paged_attention(
            query,
            inputs.kv.keys[index],
            inputs.kv.values[index],
            inputs.attention,
            scaling=self._scaling,
            window=self.layers[index].window,
            out=at.attended,
            pdl=self._pdl,  # in steps of all sizes: its kernels are as many then as without
            is_invariant=self.is_invariant,
        )

    def _queries(self, index: int, x: torch.Tensor, inputs: LayerInputs, at: Activations) -> torch.Tensor:
        return self._turned(index, self.layers[index].qkv(x, at.qkv), inputs, at)

    def _turned(self, index: int, qkv: torch.Tensor, inputs: LayerInputs, at: Activations) -> torch.Tensor:
        """The queries in a product of layer `index`, turned; its keys and values go to the cache."""
        return rope_and_write_kv(
            qkv,
            inputs.rope,
            inputs.kv_indices,
            inputs.kv.keys[index],
            inputs.kv.values[index],
            query_key_norm=self.layers[index].query_key_norm,
            epsilon=self.shape.norm_epsilon,
            out=at.query,
        )

    def join(self, index: int, attended: torch.Tensor, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """Adds what layer `index` attended to `hidden`; the `x` for `transform`."""
        layer = self.layers[index]
        update = layer.output(attended.flatten(1), at.update)
        return add_rms_norm(
            hidden, update, layer.mlp_norm, self.shape.norm_epsilon, at.normed, scale=layer.output.scale
        )

    def transform(self, index: int, x: torch.Tensor, hidden: torch.Tensor, at: Activations) -> torch.Tensor:
        """The gated products of layer `index`, added to `hidden`; the next `x`."""
        layer = self.layers[index]
        gated = gated_activation(layer.gate_up(x, at.gate_up), self.shape.activation, at.gated)
        update = layer.down(gated, at.update)
        return add_rms_norm(
            hidden, update, self._next_norms[index], self.shape.norm_epsilon, at.normed, scale=layer.down.scale
        )

    def part_seconds(self, num_tokens: int) -> tuple[float, float, float]:
        """About how long `attend`, `join` and `transform` of any layer take on the device; what attention reads left out."""
        layer, dtype, rates = self.layers[0], self.norm.dtype, self._rates
        qkv, output, gate_up, down = (
            rates.product_seconds(linear.num_bytes, num_tokens, dtype.itemsize) for linear in layer.linears
        )
        return qkv + 2 * KERNEL_SECONDS, output + KERNEL_SECONDS, gate_up + down + 2 * KERNEL_SECONDS

    def logits(self, x: torch.Tensor, at: Activations, room: torch.Tensor | None) -> torch.Tensor:
        """float32 [T, vocabulary], contiguous: in `room`, from `DecoderArena.logits`, or new.

        On a GPU the sums are not rounded to the model's dtype, in which the two largest logits are often equal.
        """
        if room is None and x.is_cuda:
            room = x.new_empty(len(x), self.shape.vocabulary_size, dtype=torch.float32)
        return self.head(x).float().contiguous() if room is None else self.head(x, room)
