"""The rotary frequencies of a transformers config, and how long a context they hold for. transformers computes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models.shape import Config, DecoderShape


@dataclass(frozen=True, slots=True)
class Rotary:
    """Frequencies in radians a position, float32 [n/2]; the factor on cosines and sines; tokens of context they hold for."""

    inverse_frequencies: torch.Tensor
    scaling: float
    context_length: int


def rotary(config: Config, shape: DecoderShape, max_context: int | None) -> Rotary:
    """The frequencies for contexts up to `max_context` (None: the model's own). Raises ModelLoadError.

    Two kinds depend on the length of the text in transformers. "dynamic" does so only beyond the model's own context, which
    is never exceeded here. "longrope" has short and long factors: contexts up to the original one take the short, as
    transformers does, and that is also the default context; when `max_context` is larger, all texts take the long ones, since
    keys in the cache cannot be turned again when a text grows over the border.
    """
    context_length = config.max_position_embeddings
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind == "longrope":
        original = parameters["original_max_position_embeddings"]
        context_length = min(max_context or original, context_length)
        frequencies, scaling = _frequencies(config, kind, context_length)
    elif kind == "default":
        # Only the families with partial rotary heads honour the factor in this kind.
        factor = parameters.get("partial_rotary_factor", 1.0) if shape.has_partial_rotary else 1.0
        size = int(shape.head_dim * factor)
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        frequencies, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    else:
        frequencies, scaling = _frequencies(config, kind, None)
    num_turned = 2 * frequencies.numel()
    if num_turned > shape.head_dim or (num_turned < shape.head_dim and not shape.has_partial_rotary):
        raise ModelLoadError(f"rope turns {num_turned} elements of heads that have {shape.head_dim}")
    return Rotary(frequencies, float(scaling), min(max_context or context_length, context_length))


def _frequencies(config: Config, kind: str, context_length: int | None) -> tuple[torch.Tensor, float]:
    """What transformers computes for a kind that is not the plain one."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # slow to import

    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=context_length)
