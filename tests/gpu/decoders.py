"""Small decoders of each family on a GPU, and what tests of them share."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import LlamaConfig, Phi3Config, PretrainedConfig, Qwen2Config, Qwen3Config

from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.interface import Arena, StepTensors
from tests.server.models.driver import random_model

CUDA = torch.device("cuda:0")
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "qwen2 with windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=40, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
    "phi3": Phi3Config(
        **SIZES,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    ),
}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Of a row's logits, norm of the difference over norm, against float32 on the CPU: rounding, grown over four layers."""


def decoder(name: str, dtype: torch.dtype, *, fuses_few_rows: bool | None = None) -> Decoder:
    """One of CONFIGS, with random weights, the same ones every time."""
    model = random_model(deepcopy(CONFIGS[name]))
    return Decoder.from_config(
        model.config, model.state_dict(), dtype=dtype, device=CUDA, fuses_few_rows=fuses_few_rows
    )


def arena_of(model: Decoder, max_tokens: int = 128, max_rows: int = 8) -> Arena:
    """Full of NaN, so that what is read and was never written shows."""
    arena = model.arena(max_tokens, max_rows)
    assert arena is not None
    for room in vars(arena).values():
        if isinstance(room, torch.Tensor):
            room.fill_(torch.nan)
    return arena


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over norm."""
    return float((found.cpu() - expected.cpu()).norm() / expected.norm())


def copied(step: StepTensors, buffers: StepTensors) -> None:
    """Puts a step's inputs into another step's tensors, of the same shapes."""
    for name in (
        "token_ids",
        "positions",
        "kv_indices",
        "block_tables",
        "context_lens",
        "query_starts",
        "last_indices",
    ):
        getattr(buffers, name).copy_(getattr(step, name))
