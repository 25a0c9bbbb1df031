"""Configurations of common models read without transformers, whose import takes seconds, where nothing in them is in doubt.

Whatever this file does not know to be plain is left to transformers' own classes; where both can read a configuration they say
the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_FAMILY_KEYS: Mapping[str, frozenset[str]] = {
    "llama": frozenset({"attention_bias", "mlp_bias", "head_dim"}),
    "mistral": frozenset({"sliding_window", "head_dim"}),
    "qwen2": frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
    "qwen3": frozenset(
        {"attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "head_dim"}
    ),
}
_COMMON_KEYS = frozenset(
    {*_SIZES, "model_type", "architectures", "hidden_act", "rms_norm_eps", "tie_word_embeddings"}
    | {"rope_theta", "rope_scaling", "rope_parameters"}
)
_IDLE_KEYS = frozenset(
    {
        "_name_or_path",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""They change no logit of a forward pass."""


@dataclass(frozen=True, slots=True)
class PlainConfig:
    """Read like an object of transformers' PreTrainedConfig; the names are its own."""

    model_type: str
    architectures: list[str] | None
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope_parameters: dict[str, Any]
    sliding_window: int | None
    layer_types: tuple[str, ...]

    def get_text_config(self) -> PlainConfig:
        return self


def read_plain(raw: Mapping[str, Any]) -> PlainConfig | None:
    """The configuration of a config.json; None when it is not plain."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _FAMILY_KEYS:
        return None
    if not raw.keys() <= _COMMON_KEYS | _FAMILY_KEYS[family] | _IDLE_KEYS:
        return None
    sizes = {name: raw.get(name) for name in _SIZES}
    flags = {name: raw.get(name, False) for name in _FLAGS}
    epsilon, activation = raw.get("rms_norm_eps"), raw.get("hidden_act", "silu")
    theta, architectures = _plain_theta(raw), raw.get("architectures")
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        return None
    if not all(type(flag) is bool for flag in flags.values()):
        return None
    if not isinstance(epsilon, float) or not isinstance(activation, str) or theta is None:
        return None
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        return None
    hidden_size, num_heads = raw["hidden_size"], raw["num_attention_heads"]
    # Qwen3 has a size of its own where none is given.
    head_dim = raw.get("head_dim", None if family == "qwen3" else hidden_size // num_heads)
    if hidden_size % num_heads or type(head_dim) is not int or head_dim <= 0 or not _has_plain_window(family, raw):
        return None
    return PlainConfig(
        model_type=family,
        architectures=architectures,
        head_dim=head_dim,
        hidden_act=activation,
        rms_norm_eps=epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        sliding_window=raw["sliding_window"] if family == "mistral" else None,
        layer_types=("full_attention",) * raw["num_hidden_layers"],
        **{name: raw[name] for name in _SIZES},
        **flags,
    )


def _plain_theta(raw: Mapping[str, Any]) -> float | None:
    """The base of the rotary frequencies, in the older or the newer spelling; None for anything but plain frequencies."""
    parameters = raw.get("rope_parameters")
    if parameters is None:
        theta = raw.get("rope_theta") if raw.get("rope_scaling") is None else None
    elif "rope_theta" in raw or "rope_scaling" in raw or not isinstance(parameters, dict):
        theta = None
    else:
        is_plain = parameters.keys() == {"rope_type", "rope_theta"} and parameters["rope_type"] == "default"
        theta = parameters["rope_theta"] if is_plain else None
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
        return None
    return float(theta) if theta > 0 else None


def _has_plain_window(family: str, raw: Mapping[str, Any]) -> bool:
    """Whether it is clear which layers look how far back."""
    if family == "mistral":  # a default of transformers' own would hold where nothing is said
        window = raw.get("sliding_window", 0)
        return window is None or (type(window) is int and window > 0)
    if raw.get("use_sliding_window", False) is not False:
        return False
    kinds = raw.get("layer_types")
    return kinds is None or kinds == ["full_attention"] * raw["num_hidden_layers"]
