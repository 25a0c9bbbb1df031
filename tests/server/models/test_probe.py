"""The trial that decides whether a model may run over the paged cache."""

from __future__ import annotations

import functools

import torch
from transformers import LlamaConfig

from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.interface import KvTensors, StepTensors
from hotgraph_server.models.probe import agrees
from tests.server.models.driver import random_model, reference_logits


@functools.cache
def pair() -> tuple[Decoder, functools.partial[torch.Tensor]]:
    """A model and the logits of its own that it must agree with."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=None,
    )
    own = random_model(config)
    decoder = Decoder.from_config(config, own.state_dict(), dtype=torch.float32, device=torch.device("cpu"))
    return decoder, functools.partial(reference_logits, own)


def test_a_right_forward_agrees() -> None:
    """A forward that gives the model's own logits is accepted."""
    decoder, own_logits = pair()
    assert agrees(decoder, decoder.forward, lambda ids: own_logits(ids.tolist()))


def test_a_forward_that_forgets_its_past_does_not_agree() -> None:
    """A forward that attends to the step's own tokens only is found out."""
    decoder, own_logits = pair()

    def forgetful(step: StepTensors, kv: KvTensors) -> torch.Tensor:
        empty = KvTensors(
            [torch.zeros_like(t) for t in kv.keys], [torch.zeros_like(t) for t in kv.values], kv.block_size
        )
        return decoder.forward(step, empty)

    assert not agrees(decoder, forgetful, lambda ids: own_logits(ids.tolist()))


def test_a_forward_that_gives_no_numbers_does_not_agree() -> None:
    """NaN equals nothing."""
    decoder, own_logits = pair()

    def broken(step: StepTensors, kv: KvTensors) -> torch.Tensor:
        return decoder.forward(step, kv) * torch.nan

    assert not agrees(decoder, broken, lambda ids: own_logits(ids.tolist()))
