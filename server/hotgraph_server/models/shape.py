"""What the lean decoder takes from a transformers config, and which configs it refuses. It knows no tensors.

The families it knows differ in a handful of switches; everything else in a config either has no effect on inference or
makes `DecoderShape.from_config` refuse, so that the bridge runs the model instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.kernels.activation import ACTIVATIONS
from hotgraph_server.models.plain_config import PlainConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Config: TypeAlias = "PretrainedConfig | PlainConfig"

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_ROPE_TYPES = frozenset({"default", "linear", "dynamic", "llama3", "yarn", "longrope"})


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The sizes and switches of one decoder. `windows` has a sliding window in tokens, or None, for each layer."""

    architecture: str
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    norm_epsilon: float
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_query_key_norm: bool
    has_fused_weights: bool  # qkv_proj and gate_up_proj stand fused in the checkpoint
    has_partial_rotary: bool  # only a part of each head may be turned
    is_tied: bool
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: Config) -> DecoderShape:
        """Raises ModelLoadError, with the reason, when the lean decoder does not know the model exactly."""
        family = config.model_type
        if family not in _ARCHITECTURES:
            raise ModelLoadError(f"the lean decoder does not know models of type {family!r}")
        if getattr(config, "quantization_config", None) is not None:
            raise ModelLoadError("the lean decoder does not run quantized checkpoints")
        if config.hidden_act not in ACTIVATIONS:
            raise ModelLoadError(f"the lean decoder does not know the activation {config.hidden_act!r}")
        if not getattr(config, "is_causal", True):
            raise ModelLoadError("the lean decoder only knows causal attention")
        rope = config.rope_parameters or {}
        if rope.get("rope_type") not in _ROPE_TYPES:
            raise ModelLoadError(f"the lean decoder does not know the rope type {rope.get('rope_type')!r}")
        has_attention_bias = bool(getattr(config, "attention_bias", False)) and family in {"llama", "qwen3"}
        num_heads = config.num_attention_heads
        num_kv_heads = config.num_key_value_heads or num_heads
        if num_heads % num_kv_heads:
            raise ModelLoadError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads")
        architectures = getattr(config, "architectures", None)
        return cls(
            architecture=architectures[0] if architectures else _ARCHITECTURES[family],
            vocabulary_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            activation=config.hidden_act,
            norm_epsilon=config.rms_norm_eps,
            has_qkv_bias=has_attention_bias or family == "qwen2",
            has_output_bias=has_attention_bias,
            has_mlp_bias=bool(getattr(config, "mlp_bias", False)) and family == "llama",
            has_query_key_norm=family == "qwen3",
            has_fused_weights=family == "phi3",
            has_partial_rotary=family == "phi3",
            is_tied=bool(config.tie_word_embeddings),
            windows=_windows(config),
        )


def _windows(config: Config) -> tuple[int | None, ...]:
    window: int | None = getattr(config, "sliding_window", None)
    num_layers: int = config.num_hidden_layers
    if config.model_type in {"mistral", "phi3"}:
        return (window,) * num_layers
    if config.model_type == "llama":
        return (None,) * num_layers
    windows: list[int | None] = []
    for kind in config.layer_types:
        if kind == "full_attention":
            windows.append(None)
        elif kind == "sliding_attention" and window is not None:
            windows.append(window)
        else:
            raise ModelLoadError(f"the lean decoder does not know layers of type {kind!r} with window {window}")
    if len(windows) != config.num_hidden_layers:
        raise ModelLoadError(f"layer_types names {len(windows)} layers, the model has {config.num_hidden_layers}")
    return tuple(windows)
