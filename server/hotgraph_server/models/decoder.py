"""One lean decoder for the Llama-shaped families: Llama, Mistral, SmolLM2, TinyLlama, Qwen2, Qwen3, Phi-3.

It knows their weights' names, and leads a step through their layers; what else a config may ask for, `models/shape.py` refuses.
The families differ from transformers' own code only in the order of float sums.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.kernels.attention import AttentionPlan
from hotgraph_server.kernels.rope import RopePlan, rotary_table
from hotgraph_server.kernels.tuning import NO_TUNINGS, TuningTable
from hotgraph_server.models import few_rows_layers
from hotgraph_server.models.arena import Activations, DecoderArena
from hotgraph_server.models.few_rows_layers import FewRowsLayers
from hotgraph_server.models.interface import Arena, KvTensors, LayerKv, StepTensors
from hotgraph_server.models.invariant_layers import InvariantLayers, ShortInvariantLayers
from hotgraph_server.models.layers import Layer, LayerInputs, Layers
from hotgraph_server.models.rotary import rotary
from hotgraph_server.models.shape import Config, DecoderShape
from hotgraph_server.models.tile_rows_layers import TileRowsLayers
from hotgraph_server.models.weights import Linear, make_linear


class Decoder:
    """A `Model` (see models/interface.py). Make it with `from_config`."""

    runner = "decoder"

    def __init__(
        self,
        layers: Layers,
        embedding: torch.Tensor,
        rope_table: torch.Tensor,
        num_parameters: int,
        *,
        fuses_few_rows: bool | None = None,
        tunings: TuningTable = NO_TUNINGS,
        batch_invariant: bool = False,
    ) -> None:
        shape = layers.shape
        self.architecture = shape.architecture
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.vocabulary_size = shape.vocabulary_size
        self.context_length = len(rope_table)
        self.num_parameters = num_parameters
        self.kv_layout: Sequence[LayerKv] = [
            LayerKv(shape.num_kv_heads, shape.head_dim, shape.head_dim)
        ] * shape.num_layers
        norms = [vector for layer in layers.layers for vector in (layer.attention_norm, layer.mlp_norm)]
        self.weights_bytes = (
            sum(linear.num_bytes for layer in layers.layers for linear in layer.linears)
            + sum(vector.nbytes for vector in norms)
            + layers.head.num_bytes
            + embedding.nbytes
            + layers.norm.nbytes
        )
        self._shape = shape
        self._layers = layers
        self._few_rows_layers: FewRowsLayers | None = None
        self._tile_rows_layers: TileRowsLayers | None = None
        self._embedding = embedding
        self._rope_table = rope_table
        if batch_invariant:
            self._layers = InvariantLayers(layers)
            self._tile_rows_layers = ShortInvariantLayers(layers, rope_table.shape[1])
            return
        if FewRowsLayers.suit(layers) if fuses_few_rows is None else fuses_few_rows:
            self._few_rows_layers = FewRowsLayers(layers, rope_table.shape[1], tunings)
        if TileRowsLayers.suit(layers) if fuses_few_rows is None else fuses_few_rows:
            self._tile_rows_layers = TileRowsLayers(layers, rope_table.shape[1])

    @property
    def is_capturable(self) -> bool:
        """With an arena, which every device but the CPU has."""
        return self.device.type != "cpu"

    @staticmethod
    def supports(config: Config) -> bool:
        """Whether this decoder computes exactly what transformers does for such a config."""
        try:
            rotary(config, DecoderShape.from_config(config), None)
        except ModelLoadError:
            return False
        return True

    @classmethod
    def from_config(
        cls,
        config: Config,
        weights: Mapping[str, torch.Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_context: int | None = None,
        fuses_few_rows: bool | None = None,
        tunings: TuningTable = NO_TUNINGS,
        batch_invariant: bool = False,
    ) -> Decoder:
        """Takes the weights by their transformers names and keeps copies. `weights` may read lazily.

        fuses_few_rows: whether short steps go through `FewRowsLayers` and `TileRowsLayers`; None: where it is faster. On the
        CPU, for tests, that takes weights which are not packed. tunings: how the products of the shortest steps are cut up, for
        good. batch_invariant: every step goes through `InvariantLayers` or `ShortInvariantLayers`; with fuses_few_rows on the
        CPU, too, where it is for tests and promises nothing.
        Raises ModelLoadError when the config is not supported, or weights are missing, left over or of a wrong shape; and when
        the model cannot be batch-invariant and has to be.
        """
        shape = DecoderShape.from_config(config)
        turn = rotary(config, shape, max_context)
        with torch.inference_mode():
            return _Builder(shape, weights, dtype, device).build(
                rotary_table(turn.inverse_frequencies.to(device), turn.scaling, turn.context_length),
                fuses_few_rows,
                tunings,
                batch_invariant,
            )

    def arena(self, max_tokens: int, max_rows: int) -> DecoderArena | None:
        """See `Model.arena`. None on the CPU, where a matrix product chooses its own layout."""
        if self.device.type == "cpu":
            return None
        if isinstance(self._layers, InvariantLayers):
            with torch.inference_mode():
                self._layers.try_out(max_tokens)
        return DecoderArena(self._shape, max_tokens=max_tokens, max_rows=max_rows, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def forward(
        self,
        step: StepTensors,
        kv: KvTensors,
        arena: Arena | None = None,
        give_way: Callable[[float], None] | None = None,
    ) -> torch.Tensor:
        """See `Model.forward`. Without an arena the result is an inference tensor."""
        assert arena is None or isinstance(arena, DecoderArena)
        num_tokens, num_rows = len(step.token_ids), len(step.last_indices)
        is_one_token_a_row = num_tokens == num_rows and (arena is not None or step.num_decode_rows == step.num_rows > 0)
        layers = self._layers_for(max(num_tokens, num_rows))
        inputs = LayerInputs(
            kv,
            step.kv_indices,
            AttentionPlan.for_step(step, block_size=kv.block_size, dtype=self.dtype),
            RopePlan.for_step(self._rope_table, step.positions, self.dtype),
        )
        at = Activations() if arena is None else arena.tokens(num_tokens)
        hidden = torch.index_select(self._embedding, 0, step.token_ids, out=at.hidden)
        x = layers.enter(hidden, at)
        attend_seconds, join_seconds, transform_seconds = (
            (0.0, 0.0, 0.0) if give_way is None else layers.part_seconds(num_tokens)
        )
        for index in range(self._shape.num_layers):
            attended = layers.attend(index, x, inputs, at)
            if give_way is not None:
                give_way(attend_seconds)
            if index == self._shape.num_layers - 1 and not is_one_token_a_row:
                # Of the last layer only what the logits are made of is needed.
                at = Activations() if arena is None else arena.last_tokens(num_rows)
                attended = torch.index_select(attended, 0, step.last_indices, out=at.attended)
                hidden = torch.index_select(hidden, 0, step.last_indices, out=at.hidden)
            x = layers.join(index, attended, hidden, at)
            if give_way is not None:
                give_way(join_seconds)
            x = layers.transform(index, x, hidden, at)
            if give_way is not None:
                give_way(transform_seconds)
        if give_way is not None:
            give_way(math.inf)  # the head may be as large as several layers
        return layers.logits(x, at, None if arena is None else arena.logits(num_rows))

    def _layers_for(self, num_tokens: int) -> Layers:
        """num_tokens: of a step, or its rows where padding rows make these more."""
        tiles, few = self._tile_rows_layers, self._few_rows_layers
        if tiles is not None and tiles.min_tokens <= num_tokens <= tiles.max_tokens:
            return tiles
        if few is not None and num_tokens <= few_rows_layers.MAX_TOKENS:
            return few
        return self._layers


class _Builder:
    """Makes a `Decoder` of named weights: fuses what is multiplied together, checks shapes, leaves nothing over."""

    def __init__(
        self, shape: DecoderShape, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape = shape
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}  # elements of each weight taken

    def build(
        self, rope_table: torch.Tensor, fuses_few_rows: bool | None, tunings: TuningTable, batch_invariant: bool
    ) -> Decoder:
        """The decoder; the weights it was made of may go. Raises ModelLoadError."""
        shape = self._shape
        embedding = self._vector("model.embed_tokens.weight", shape.vocabulary_size, shape.hidden_size)
        # Packing a matrix is one thread's work outside the interpreter's lock, and there are many matrices.
        num_workers = torch.get_num_threads() if self._device.type == "cpu" else 1
        with ThreadPoolExecutor(num_workers, thread_name_prefix="weights") as executor:
            head = executor.submit(self._head, embedding)
            layers = list(executor.map(self._layer, range(shape.num_layers)))
        norm = self._vector("model.norm.weight", shape.hidden_size).mul_(head.result().scale)
        self._check_leftovers()
        plain = Layers(shape, layers, norm, head.result())
        if batch_invariant and not fuses_few_rows and (fault := InvariantLayers.fault(plain)):
            raise ModelLoadError(f"model.batch_invariant {fault}")
        return Decoder(
            plain,
            embedding,
            rope_table,
            sum(self._sizes.values()),
            fuses_few_rows=fuses_few_rows,
            tunings=tunings,
            batch_invariant=batch_invariant,
        )

    @torch.inference_mode()  # a mode of the thread, so each worker enters it
    def _head(self, embedding: torch.Tensor) -> Linear:
        shape = self._shape
        if shape.is_tied:
            return make_linear([embedding], [], dtype=self._dtype, device=self._device, scales_input=True, shares=True)
        return self._linear(["lm_head"], [shape.vocabulary_size], shape.hidden_size, has_bias=False, scales_input=True)

    @torch.inference_mode()
    def _layer(self, index: int) -> Layer:
        shape = self._shape
        prefix = f"model.layers.{index}."
        query_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        qkv_names, qkv_sizes = ["q_proj", "k_proj", "v_proj"], [query_size, kv_size, kv_size]
        gate_up_names, gate_up_sizes = ["gate_proj", "up_proj"], [shape.intermediate_size] * 2
        if shape.has_fused_weights:
            qkv_names, qkv_sizes = ["qkv_proj"], [sum(qkv_sizes)]
            gate_up_names, gate_up_sizes = ["gate_up_proj"], [sum(gate_up_sizes)]
        qkv = self._linear(
            [f"{prefix}self_attn.{name}" for name in qkv_names],
            qkv_sizes,
            shape.hidden_size,
            has_bias=shape.has_qkv_bias,
            scales_input=True,
        )
        gate_up = self._linear(
            [f"{prefix}mlp.{name}" for name in gate_up_names],
            gate_up_sizes,
            shape.hidden_size,
            has_bias=shape.has_mlp_bias,
            scales_input=True,
        )
        query_key_norm = None
        if shape.has_query_key_norm:
            query_norm = self._vector(f"{prefix}self_attn.q_norm.weight", shape.head_dim)
            key_norm = self._vector(f"{prefix}self_attn.k_norm.weight", shape.head_dim)
            query_key_norm = torch.cat(
                (query_norm.expand(shape.num_heads, -1), key_norm.expand(shape.num_kv_heads, -1))
            )
        return Layer(
            attention_norm=self._vector(f"{prefix}input_layernorm.weight", shape.hidden_size).mul_(qkv.scale),
            qkv=qkv,
            query_key_norm=query_key_norm,
            output=self._linear(
                [f"{prefix}self_attn.o_proj"], [shape.hidden_size], query_size, has_bias=shape.has_output_bias
            ),
            mlp_norm=self._vector(f"{prefix}post_attention_layernorm.weight", shape.hidden_size).mul_(gate_up.scale),
            gate_up=gate_up,
            down=self._linear(
                [f"{prefix}mlp.down_proj"], [shape.hidden_size], shape.intermediate_size, has_bias=shape.has_mlp_bias
            ),
            window=shape.windows[index],
        )

    def _linear(
        self, names: Sequence[str], sizes: Sequence[int], input_size: int, *, has_bias: bool, scales_input: bool = False
    ) -> Linear:
        return make_linear(
            [self._take(f"{name}.weight", size, input_size) for name, size in zip(names, sizes, strict=True)],
            [self._take(f"{name}.bias", size) for name, size in zip(names, sizes, strict=True)] if has_bias else [],
            dtype=self._dtype,
            device=self._device,
            scales_input=scales_input,
        )

    def _vector(self, name: str, *size: int) -> torch.Tensor:
        """A copy of the weight, in our dtype and on our device."""
        return self._take(name, *size).to(self._device, self._dtype, copy=True)

    def _take(self, name: str, *size: int) -> torch.Tensor:
        with self._lock:  # the mapping may read a file
            try:
                tensor = self._weights[name]
            except KeyError:
                raise ModelLoadError(f"the checkpoint lacks the weight {name!r}") from None
            self._sizes[name] = tensor.numel()
        if tensor.shape != size:
            raise ModelLoadError(f"the weight {name!r} is {tuple(tensor.shape)}, the config says {size}")
        if not tensor.is_floating_point():
            raise ModelLoadError(
                f"the weight {name!r} is of type {tensor.dtype}, where numbers with a fraction are needed"
            )
        return tensor

    def _check_leftovers(self) -> None:
        """A weight that we do not use means a model that we do not know."""
        leftovers = [
            name
            for name in self._weights
            if name not in self._sizes
            and not name.endswith("rotary_emb.inv_freq")  # computed from the config
            and not (self._shape.is_tied and name == "lm_head.weight")  # a second copy of the embedding
        ]
        if leftovers:
            raise ModelLoadError(
                f"the checkpoint has {len(leftovers)} weights too many, such as {sorted(leftovers)[0]!r}"
            )
