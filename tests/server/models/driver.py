"""Drives a model as the engine does: makes StepTensors of named sequences over a paged cache. Nothing of the engine is used.

The cache is filled with NaN at first, so that anything read that was never written shows, and the blocks of a sequence are
drawn at random, so that they neither follow each other nor ascend.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hotgraph_server.models.interface import Arena, KvTensors, Model, StepTensors


@dataclass(slots=True)
class _Sequence:
    num_tokens: int = 0
    blocks: list[int] = field(default_factory=list)


class Driver:
    """Feeds a model, with an arena if given. Steps are padded by `num_padding_tokens` tokens and `num_padding_rows` rows."""

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int = 128,
        block_size: int = 16,
        num_padding_tokens: int = 0,
        num_padding_rows: int = 0,
        arena: Arena | None = None,
        seed: int = 0,
    ) -> None:
        self._model = model
        self._arena = arena
        self._block_size = block_size
        self._num_padding_tokens = num_padding_tokens
        self._num_padding_rows = num_padding_rows
        self._free = list(range(1, num_blocks))
        random.Random(seed).shuffle(self._free)
        self._sequences: dict[str, _Sequence] = {}
        shape = (num_blocks, block_size)

        def unwritten(num_heads: int, size: int) -> torch.Tensor:
            return torch.full((*shape, num_heads, size), torch.nan, dtype=model.dtype, device=model.device)

        self.kv = KvTensors(
            [unwritten(layer.num_heads, layer.key_dim) for layer in model.kv_layout],
            [unwritten(layer.num_heads, layer.value_dim) for layer in model.kv_layout],
            block_size,
        )

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Appends tokens to sequences (a new name begins one), in one step; logits [vocabulary] after each one's last."""
        tensors, names = self.tensors(tokens)
        logits = self._model.forward(tensors, self.kv, self._arena)
        assert logits.shape == (len(tensors.last_indices), self._model.vocabulary_size)
        assert logits.dtype == torch.float32
        return {name: logits[row].clone() for row, name in enumerate(names)}

    def tensors(self, tokens: Mapping[str, Sequence[int]]) -> tuple[StepTensors, list[str]]:
        """The step's inputs, and the names of its rows in their order."""
        names = sorted(tokens, key=lambda name: len(tokens[name]) > 1)  # decode rows first; stable
        token_ids: list[int] = []
        positions: list[int] = []
        kv_indices: list[int] = []
        query_starts = [0]
        for name in names:
            sequence = self._sequences.setdefault(name, _Sequence())
            for token in tokens[name]:
                index, offset = divmod(sequence.num_tokens, self._block_size)
                if index == len(sequence.blocks):
                    sequence.blocks.append(self._free.pop())
                token_ids.append(token)
                positions.append(sequence.num_tokens)
                kv_indices.append(sequence.blocks[index] * self._block_size + offset)
                sequence.num_tokens += 1
            query_starts.append(len(token_ids))
        sequences = [self._sequences[name] for name in names]
        max_blocks = max(len(sequence.blocks) for sequence in self._sequences.values()) + 3
        tables = [sequence.blocks + [0] * (max_blocks - len(sequence.blocks)) for sequence in sequences]
        lengths = [sequence.num_tokens for sequence in sequences]
        token_padding, row_padding = [0] * self._num_padding_tokens, self._num_padding_rows
        device = self._model.device
        return StepTensors(
            token_ids=torch.tensor(token_ids + token_padding, device=device),
            positions=torch.tensor(positions + token_padding, device=device),
            kv_indices=torch.tensor(kv_indices + token_padding, device=device),
            block_tables=torch.tensor(tables + [[0] * max_blocks] * row_padding, dtype=torch.int32, device=device),
            context_lens=torch.tensor(lengths + [0] * row_padding, dtype=torch.int32, device=device),
            query_starts=torch.tensor(query_starts + query_starts[-1:] * row_padding, dtype=torch.int32, device=device),
            last_indices=torch.tensor([start - 1 for start in query_starts[1:]] + [0] * row_padding, device=device),
            query_lens=[len(tokens[name]) for name in names],
            host_context_lens=lengths,
            num_decode_rows=sum(len(tokens[name]) == 1 for name in names),
        ), names

    def table(self, name: str) -> list[int]:
        """The blocks of a sequence."""
        return list(self._sequences[name].blocks)


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of transformers whose weights all have a size at which they matter: logits of about 1, of the whole text."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
            elif "norm" in name or "ln_" in name:
                parameter.copy_(parameter + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def round_to_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the weights what a published checkpoint's are, without changing their dtype. In place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


def random_tokens(num_tokens: int, vocabulary_size: int, seed: int) -> list[int]:
    """Token ids, the same for the same arguments."""
    return [random.Random(seed * 10007 + i).randrange(vocabulary_size) for i in range(num_tokens)]


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """transformers' own logits after every token: float32 [len(token_ids), vocabulary]."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits
    return logits[0].float()
