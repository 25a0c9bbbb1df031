"""A very small attention model that implements models.interface.Model, and its own dense forward to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hotgraph_server.models.interface import Arena, KvTensors, LayerKv, StepTensors

VOCABULARY = 97
CONTEXT = 96
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 2, 8
HIDDEN = NUM_HEADS * HEAD_DIM
PART_SECONDS = 1e-5  # that a layer says it takes


class TinyModel:
    """Two layers of attention. Settable to give NaN for a token, or to raise."""

    architecture = "TinyForCausalLM"
    runner = "decoder"
    dtype = torch.float32
    device = torch.device("cpu")
    vocabulary_size = VOCABULARY
    context_length = CONTEXT
    num_parameters = 1234
    weights_bytes = 4936
    kv_layout: Sequence[LayerKv] = tuple(LayerKv(NUM_HEADS, HEAD_DIM, HEAD_DIM) for _ in range(NUM_LAYERS))

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 0.6) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * scale

        self.embedding = draw(VOCABULARY, HIDDEN, scale=1.0)
        self.places = draw(CONTEXT, HIDDEN, scale=0.5)
        self.projections = [draw(3, HIDDEN, HIDDEN) for _ in range(NUM_LAYERS)]
        self.head = draw(HIDDEN, VOCABULARY, scale=1.0)
        self.nan_token: int | None = None  # a row whose last token this is gives NaN
        self.error: Exception | None = None
        self.errors: list[Exception] = []  # of the next forwards, each half way
        self.shapes: list[tuple[int, int]] = []  # (tokens, rows) of every forward

    is_capturable = False

    def arena(self, max_tokens: int, max_rows: int) -> None:
        """It allocates as it goes."""

    def forward(
        self,
        step: StepTensors,
        kv: KvTensors,
        arena: Arena | None = None,
        give_way: Callable[[float], None] | None = None,
    ) -> torch.Tensor:
        """See models.interface.Model."""
        if self.error is not None:
            raise self.error
        self.shapes.append((len(step.token_ids), len(step.last_indices)))
        assert step.context_lens[: step.num_rows].tolist() == list(step.host_context_lens)
        assert step.context_lens[step.num_rows :].tolist() == [0] * (len(step.context_lens) - step.num_rows)
        assert all(length == 1 for length in step.query_lens[: step.num_decode_rows])
        assert all(length > 1 for length in step.query_lens[step.num_decode_rows :])
        hidden = self.embedding[step.token_ids] + self.places[step.positions]
        for layer, projection in enumerate(self.projections):
            query, key, value = ((hidden @ matrix).view(-1, NUM_HEADS, HEAD_DIM) for matrix in projection.unbind())
            keys, values = kv.keys[layer].flatten(0, 1), kv.values[layer].flatten(0, 1)
            keys[step.kv_indices] = key
            values[step.kv_indices] = value
            if self.errors and layer > 0:
                raise self.errors.pop(0)
            attended = torch.zeros_like(hidden)
            for row, (query_len, context_len) in enumerate(zip(step.query_lens, step.host_context_lens, strict=True)):
                begin = int(step.query_starts[row])
                slots = torch.arange(context_len)
                indices = step.block_tables[row][slots // kv.block_size].long() * kv.block_size + slots % kv.block_size
                attended[begin : begin + query_len] = attend(
                    query[begin : begin + query_len], keys[indices], values[indices]
                )
            hidden = hidden + attended
            if give_way is not None:
                give_way(PART_SECONDS)
        logits = hidden[step.last_indices] @ self.head
        if self.nan_token is not None:
            logits[step.token_ids[step.last_indices] == self.nan_token] = torch.nan
        return logits

    def dense(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The logits after the last of the tokens, computed without any cache: float32 [vocabulary]."""
        ids = torch.tensor(token_ids)
        hidden = self.embedding[ids] + self.places[: len(ids)]
        for projection in self.projections:
            query, key, value = ((hidden @ matrix).view(-1, NUM_HEADS, HEAD_DIM) for matrix in projection.unbind())
            hidden = hidden + attend(query, key, value)
        return hidden[-1] @ self.head


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last queries over all keys: [queries, HIDDEN]."""
    num_queries, num_keys = len(query), len(key)
    scores = torch.einsum("qhd,khd->hqk", query, key) * HEAD_DIM**-0.5
    visible = torch.arange(num_keys) <= torch.arange(num_keys - num_queries, num_keys).unsqueeze(1)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@dataclass
class Tiny:
    """A tiny model in place: what TorchEngine is given."""

    model: TinyModel = field(default_factory=TinyModel)
    model_id: str = "tiny"
