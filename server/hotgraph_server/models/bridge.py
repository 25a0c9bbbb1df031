"""Runs any causal language model of transformers: its own forward over our steps and our paged cache. Slower than the
decoder, never refused.

Where the model takes its attention through transformers' AttentionInterface, all rows of a step go through it as one packed
sequence, and our attention finds each row's past in the paged cache. Whether that gives the model's own logits is tried out
when it is loaded. Where it does not (state-space models, ALiBi, masks of a special kind), each row's whole text is computed
anew at every step; the cache then holds the texts' token ids.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from hotgraph_server.kernels.attention import AttentionPlan, paged_attention
from hotgraph_server.kernels.kv_write import write_kv
from hotgraph_server.models.interface import Arena, KvTensors, LayerKv, StepTensors
from hotgraph_server.models.probe import agrees

_logger = logging.getLogger(__name__)

_IMPLEMENTATION = "hotgraph_paged"

# What models pass to their attention and what changes nothing here: positions are in queries and keys already, and what is
# returned beside the result is ours to decide.
_HARMLESS_ARGUMENTS = frozenset(
    {
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)

# Where a config states no limit, texts are kept to this many tokens unless the settings say otherwise.
_DEFAULT_CONTEXT = 2048

# Token ids are kept in the cache as digits to this base, which every float dtype holds exactly.
_DIGIT_BASE = 256


class _NotPagedError(Exception):
    """The model's attention does something that our attention cannot do over the paged cache."""


class _Recorder:
    """Stands for a step when the layers are first counted: notes what each layer's attention is given, and gives zeros."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerKv] = {}
        self.windows: dict[int, int | None] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if layer in self.layers:
            raise _NotPagedError(f"layer {layer} attends twice")
        self.layers[layer] = LayerKv(key.shape[1], key.shape[2], value.shape[2])
        self.windows[layer] = window
        return query.new_zeros(*query.shape[:2], value.shape[2])


class _PagedStep:
    """Travels through the model's keyword arguments to its attention: one step's cache and rows."""

    def __init__(self, step: StepTensors, kv: KvTensors, cache_index: dict[int, int], dtype: torch.dtype) -> None:
        self._step = step
        self._kv = kv
        self._cache_index = cache_index
        self._plan = AttentionPlan.for_step(step, block_size=kv.block_size, dtype=dtype)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        index = self._cache_index[layer]
        keys, values = self._kv.keys[index], self._kv.values[index]
        write_kv(key.to(keys.dtype), value.to(values.dtype), keys, values, self._step.kv_indices)
        return paged_attention(
            query, keys, values, self._plan, scaling=scaling, window=window, softcap=softcap, sinks=sinks
        )


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    hotgraph_step: _PagedStep | _Recorder | None = None,
    **arguments: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for each layer. query: [1, heads, T, dim], key and value alike; the result is [1, T, heads, dim].

    Raises _NotPagedError when it is asked for something that it does not know.
    """
    if hotgraph_step is None:
        raise _NotPagedError("the model does not pass keyword arguments on to its attention")
    unknown = [name for name, given in arguments.items() if given is not None and name not in _HARMLESS_ARGUMENTS]
    is_causal = arguments.get("is_causal")
    if unknown and not (unknown == ["is_causal"] and is_causal is True):
        raise _NotPagedError(f"the model's attention takes {', '.join(unknown)}")
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise _NotPagedError("the model's attention has a mask of its own")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise _NotPagedError("the model's attention does not know its layer")
    result = hotgraph_step.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return result.unsqueeze(0), None


AttentionInterface.register(_IMPLEMENTATION, _attention)


class Bridge:
    """A `Model` (see models/interface.py) around one of transformers. `is_paged` tells which way it runs, and
    `recompute_reason` why it is not paged, empty when it is."""

    runner = "bridge"

    def __init__(self, hf_model: PreTrainedModel, *, max_context: int | None = None) -> None:
        """Takes the model over: nobody else may run it. `max_context` limits the tokens of one text."""
        hf_model.eval()  # type: ignore[no-untyped-call]
        self._model = hf_model
        config = hf_model.config.get_text_config()
        parameters = list(hf_model.parameters())
        self.architecture = type(hf_model).__name__
        self.dtype = hf_model.dtype
        self.device = hf_model.device
        self.num_parameters = sum(parameter.numel() for parameter in parameters)
        self.weights_bytes = sum(parameter.nbytes for parameter in parameters)
        self.context_length = _context_length(config, max_context)
        self.vocabulary_size = int(config.vocab_size)
        self._forward_arguments = frozenset(inspect.signature(hf_model.forward).parameters)
        self._cache_index: dict[int, int] = {}
        self.kv_layout: Sequence[LayerKv] = []
        self.recompute_reason = self._try_paging(config)
        self.is_paged = not self.recompute_reason
        if not self.is_paged:
            # One token id a slot: two low digits as its key, the high one as its value.
            self.kv_layout = [LayerKv(1, 2, 1)]
            _logger.info("%s computes every text anew: %s", self.architecture, self.recompute_reason)

    @property
    def is_capturable(self) -> bool:
        """Texts that are computed anew are as long as the host says."""
        return self.is_paged and self.device.type != "cpu"

    def arena(self, max_tokens: int, max_rows: int) -> None:
        """None: transformers makes its own tensors."""

    @torch.inference_mode()
    def forward(
        self,
        step: StepTensors,
        kv: KvTensors,
        arena: Arena | None = None,
        give_way: Callable[[float], None] | None = None,
    ) -> torch.Tensor:
        """See `Model.forward`. The result is an inference tensor."""
        if self.is_paged:
            return self._forward_paged(step, kv)
        return self._forward_anew(step, kv)

    def _forward_paged(self, step: StepTensors, kv: KvTensors) -> torch.Tensor:
        return self._packed_logits(
            step.token_ids, step.positions, step.last_indices, _PagedStep(step, kv, self._cache_index, self.dtype)
        )

    def _packed_logits(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        last_indices: torch.Tensor,
        hotgraph_step: _PagedStep | _Recorder,
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {"position_ids": positions.unsqueeze(0), "hotgraph_step": hotgraph_step}
        is_selected = "logits_to_keep" in self._forward_arguments
        if is_selected:
            arguments["logits_to_keep"] = last_indices
        logits: torch.Tensor = self._model(input_ids=token_ids.unsqueeze(0), use_cache=False, **arguments).logits[0]
        return (logits if is_selected else logits.index_select(0, last_indices)).float()

    def _forward_anew(self, step: StepTensors, kv: KvTensors) -> torch.Tensor:
        """Stores the step's token ids, then runs the model over the whole text of each row."""
        digits = (step.token_ids, step.token_ids // _DIGIT_BASE, step.token_ids // _DIGIT_BASE**2)
        stored = torch.stack([digit % _DIGIT_BASE for digit in digits], dim=-1).unsqueeze(1).to(self.dtype)
        write_kv(stored[..., :2], stored[..., 2:], kv.keys[0], kv.values[0], step.kv_indices)
        low, high = kv.keys[0].flatten(0, 2), kv.values[0].flatten()
        offsets = torch.arange(kv.block_size, device=self.device)
        logits = torch.zeros(len(step.last_indices), self.vocabulary_size, device=self.device)
        for row, length in enumerate(step.host_context_lens):
            slots = (step.block_tables[row].long().unsqueeze(-1) * kv.block_size + offsets).flatten()[:length]
            text = low[slots, 0].long() + low[slots, 1].long() * _DIGIT_BASE + high[slots].long() * _DIGIT_BASE**2
            logits[row] = self._own_logits(text, num_kept=1)[-1]
        return logits

    def _own_logits(self, token_ids: torch.Tensor, *, num_kept: int = 0) -> torch.Tensor:
        """The model's own logits for one text, float32 [tokens, vocabulary]; `num_kept` of the last tokens at least."""
        arguments: dict[str, Any] = {"logits_to_keep": num_kept} if "logits_to_keep" in self._forward_arguments else {}
        logits: torch.Tensor = self._model(input_ids=token_ids.unsqueeze(0), use_cache=False, **arguments).logits[0]
        return logits.float()

    @torch.inference_mode()
    def _try_paging(self, config: PretrainedConfig) -> str:
        """Sets the model up for the paged cache if that gives its own logits; otherwise leaves it alone and says why."""
        reason = self._known_obstacle(config)
        if reason:
            return reason
        own_implementation = self._model.config._attn_implementation
        recorder = _Recorder()
        try:
            self._model.set_attn_implementation(_IMPLEMENTATION)
            few = torch.zeros(2, dtype=torch.int64, device=self.device)
            self._packed_logits(few, few, few[:1], recorder)
            reason = _hidden_window(config, recorder)
        except Exception as error:  # whatever other people's code raises when it is run in a way it was not made for
            reason = f"{type(error).__name__}: {error}"
        if not reason:
            self._cache_index = {layer: index for index, layer in enumerate(sorted(recorder.layers))}
            self.kv_layout = [recorder.layers[layer] for layer in self._cache_index]
            reason = self._difference(own_implementation)
        if reason:
            self._model.set_attn_implementation(own_implementation)
        return reason

    def _known_obstacle(self, config: PretrainedConfig) -> str:
        if not getattr(self._model, "_supports_attention_backend", False):
            return "it does not take its attention from transformers' interface"
        if "position_ids" not in self._forward_arguments:
            return "it takes no positions"
        if "longrope" in _rope_kinds(config) and self.context_length > _original_context(config):
            return "its rotary frequencies depend on the length of the whole text"
        return ""

    def _difference(self, own_implementation: str) -> str:
        """Empty when the paged forward gives the logits of the model's own."""

        def own_logits(token_ids: torch.Tensor) -> torch.Tensor:
            self._model.set_attn_implementation(own_implementation)
            try:
                return self._own_logits(token_ids)
            finally:
                self._model.set_attn_implementation(_IMPLEMENTATION)

        try:
            is_equal = agrees(self, self._forward_paged, own_logits)
        except Exception as error:  # as above
            return f"{type(error).__name__}: {error}"
        return "" if is_equal else "its logits over the paged cache differ from its own"


def _hidden_window(config: PretrainedConfig, recorder: _Recorder) -> str:
    """Why a layer may look back less far than its attention was told; empty when none may. Short trials do not show it."""
    if getattr(config, "attention_chunk_size", None):
        return "it attends in chunks"
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        is_told = window is None or any(recorder.windows.values())
        return "" if is_told else "its sliding window is only in its mask"
    for layer, kind in enumerate(kinds):
        if kind not in {"full_attention", "sliding_attention"}:
            return f"it has layers of type {kind}"
        if kind == "sliding_attention" and not recorder.windows.get(layer):
            return "its sliding window is only in its mask"
    return ""


def _rope_kinds(config: PretrainedConfig) -> set[str]:
    """The rope types of all layers; the parameters are one dictionary, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [given for given in parameters.values() if isinstance(given, dict)]
    return {given.get("rope_type", "default") for given in nested or [parameters]}


def _original_context(config: PretrainedConfig) -> int:
    parameters = config.rope_parameters
    return int(parameters.get("original_max_position_embeddings", config.max_position_embeddings))


def _context_length(config: PretrainedConfig, max_context: int | None) -> int:
    """Tokens of one text. With longrope the original context is the default, as it is for the decoder."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
    limits = [limit for name in names if isinstance(limit := getattr(config, name, None), int) and limit > 0]
    if not limits:
        return max_context or _DEFAULT_CONTEXT
    if max_context is None and "longrope" in _rope_kinds(config):
        return min(limits[0], _original_context(config))
    return min(limits[0], max_context or limits[0])
