"""Loads a model and its tokenizer from what the settings name: finds it, checks it, and picks the runner.

It knows files and formats. How a model computes is in `decoder.py` (the lean one, taken where it knows the architecture)
and `bridge.py` (anything else that transformers can run).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hotgraph_server.config import ModelSettings
from hotgraph_server.errors import ModelLoadError
from hotgraph_server.kernels.tuning import load_tunings
from hotgraph_server.models import convert
from hotgraph_server.models.checkpoint import open_checkpoint
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.download import Progress
from hotgraph_server.models.gguf_file import GgufFile
from hotgraph_server.models.interface import Model
from hotgraph_server.models.json_file import read_json
from hotgraph_server.models.plain_config import PlainConfig, read_plain
from hotgraph_server.models.rotary import rotary
from hotgraph_server.models.shape import Config, DecoderShape
from hotgraph_server.models.sources import Source, resolve
from hotgraph_server.models.tokenizer import HuggingFaceTokenizer, TokenizerSettings, load_tokenizer
from hotgraph_server.models.transformers_model import first_line, read_gguf_config, read_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json says besides the tokens that end a text; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights in place, and what belongs to it. `path` is the folder or GGUF file it came from."""

    model: Model
    tokenizer: HuggingFaceTokenizer
    model_id: str
    generation: GenerationDefaults
    path: Path


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """What a lean decoder's kernels depend on. num_turned: elements of a head that rope turns."""

    shape: DecoderShape
    num_turned: int
    dtype: torch.dtype
    device: torch.device


def load_model(settings: ModelSettings, *, cache: Path | None = None, progress: Progress | None = None) -> LoadedModel:
    """Loads what `settings` names. `cache` is the folder of embedded models, by default the user's own.

    Raises ModelLoadError, naming the file, for anything missing, damaged, unsafe or unsupported.
    """
    device = choose_device(settings.device)
    source = resolve(settings.source, cache=cache, progress=progress)
    parts = _open(source, settings)
    dtype = choose_dtype(settings.dtype, device, parts.dtype)
    _check_max_context(settings, parts.config, source.path)
    if parts.tokenizer.vocabulary_size > (rows := _vocabulary_size(parts.config)):
        raise ModelLoadError(
            f"{source.path}: its tokenizer has {parts.tokenizer.vocabulary_size} tokens, its model only {rows}"
        )
    model = _make_model(settings, parts, source.path, dtype=dtype, device=device)
    return LoadedModel(model, parts.tokenizer, settings.id or source.model_id, parts.generation, source.path)


def read_sizes(
    settings: ModelSettings, *, cache: Path | None = None, progress: Progress | None = None
) -> DecoderSizes | None:
    """The sizes of the decoder that `load_model` would make, without reading weights; None when it would take the bridge.

    Raises ModelLoadError as that does, as far as it looks.
    """
    device = choose_device(settings.device)
    source = resolve(settings.source, cache=cache, progress=progress)
    parts = _open(source, settings)
    if settings.runner == "bridge" or parts.weights is None or not Decoder.supports(parts.config):
        return None
    shape = DecoderShape.from_config(parts.config)
    num_turned = 2 * rotary(parts.config, shape, settings.max_context).inverse_frequencies.numel()
    return DecoderSizes(shape, num_turned, choose_dtype(settings.dtype, device, parts.dtype), device)


def choose_device(wanted: str) -> torch.device:
    """The device that a setting means. A CUDA device asked for and not there is an error, never a silent CPU."""
    if wanted == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(wanted)
    if device.type == "cuda":
        num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= num_devices:
            raise ModelLoadError(f"device {wanted} was asked for, but {num_devices} CUDA devices are available")
        return torch.device("cuda", index)
    return device


def choose_dtype(wanted: str, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """The type to compute in. "auto": float32 on the CPU, else the checkpoint's if it is a half type, else bfloat16."""
    if wanted != "auto":
        return _DTYPES[wanted]
    if device.type == "cpu":
        return torch.float32
    return checkpoint if checkpoint in (torch.float16, torch.bfloat16) else torch.bfloat16


@dataclass(frozen=True, slots=True)
class _Parts:
    """A source opened and checked, nothing large read yet. `dtype` is that of its weights.

    `weights` is None for a GGUF file whose names for them only transformers knows.
    """

    config: Config
    weights: Mapping[str, torch.Tensor] | None
    dtype: torch.dtype
    tokenizer: HuggingFaceTokenizer
    generation: GenerationDefaults


def _open(source: Source, settings: ModelSettings) -> _Parts:
    is_plain = settings.runner != "bridge"  # which needs transformers' own configuration, and transformers anyway
    return _open_gguf(source, is_plain=is_plain) if source.is_gguf else _open_folder(source, is_plain=is_plain)


def _open_folder(source: Source, *, is_plain: bool) -> _Parts:
    folder = source.path
    raw_config = read_json(folder / CONFIG)
    generation = read_json(folder / GENERATION_CONFIG, is_optional=True)
    config = choose_config(raw_config, folder / CONFIG, is_plain=is_plain)
    checkpoint = open_checkpoint(folder)
    eos = _token_ids(generation.get("eos_token_id", raw_config.get("eos_token_id")), folder / GENERATION_CONFIG)
    tokenizer = load_tokenizer(folder, eos_token_ids=eos)
    return _Parts(config, checkpoint, checkpoint.dtype, tokenizer, _generation_defaults(generation))


def _open_gguf(source: Source, *, is_plain: bool) -> _Parts:
    file = GgufFile(source.path)
    backend, tokenizer_config = convert.build_tokenizer(file)
    special = {name: token for name, token in tokenizer_config.items() if name.endswith("_token") and token}
    tokenizer = HuggingFaceTokenizer(
        backend,
        TokenizerSettings(special, tokenizer_config["chat_template"]),
        eos_token_ids=convert.end_token_ids(file),
    )
    if not convert.is_known(file):
        return _Parts(read_gguf_config(source.path), None, torch.float32, tokenizer, GenerationDefaults())
    raw_config = convert.read_config(file)
    weights = convert.GgufWeights(file, raw_config)
    config = choose_config(raw_config, source.path, is_plain=is_plain)
    return _Parts(config, weights, torch.float32, tokenizer, GenerationDefaults())


def choose_config(raw: Mapping[str, Any], path: Path, *, is_plain: bool) -> Config:
    """The configuration as the lean decoder needs it, without transformers, where it is plain; else as `make_config` has it."""
    plain = read_plain(raw) if is_plain else None
    return plain if plain is not None and Decoder.supports(plain) else make_config(raw, path)


def make_config(raw: Mapping[str, Any], path: Path) -> PreTrainedConfig:
    """The configuration object of transformers' own class for the model type. No code of the folder's is ever run.

    `auto_map` (the way to ask for such code) is passed over for types that transformers knows, and refused for others.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # takes seconds to import

    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ModelLoadError(f"{path}: names no model_type")
    if model_type not in CONFIG_MAPPING:
        code = ", and the code it brings along (auto_map) is never run" if "auto_map" in raw else ""
        raise ModelLoadError(f"{path}: model_type {model_type!r} is not known{code}")
    if quantisation := raw.get("quantization_config"):
        method = (
            quantisation.get("quant_method", "an unknown method") if isinstance(quantisation, dict) else quantisation
        )
        raise ModelLoadError(f"{path}: weights quantised with {method} are not supported")
    known = {name: value for name, value in raw.items() if name != "auto_map"}
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(known)
    except Exception as error:  # the classes check themselves with error types of several libraries
        raise ModelLoadError(f"{path}: is no sound configuration of {model_type!r} ({first_line(error)})") from error
    return config


def _make_model(
    settings: ModelSettings, parts: _Parts, path: Path, *, dtype: torch.dtype, device: torch.device
) -> Model:
    config, max_context = parts.config, settings.max_context
    is_supported = Decoder.supports(config)
    if settings.runner == "decoder" and (parts.weights is None or not is_supported):
        raise ModelLoadError(
            f"{path}: the lean decoder does not know this model ({config.model_type!r}); use the bridge"
        )
    try:
        if is_supported and parts.weights is not None and settings.runner != "bridge":
            return Decoder.from_config(
                config,
                parts.weights,
                dtype=dtype,
                device=device,
                max_context=max_context,
                tunings=load_tunings("off" if settings.batch_invariant else settings.tuning, device),
                batch_invariant=settings.batch_invariant,
            )
        if settings.batch_invariant:
            raise ModelLoadError(f"{path}: model.batch_invariant needs a model that the lean decoder runs")
        from hotgraph_server.models.bridge import Bridge

        assert not isinstance(config, PlainConfig), "what the decoder knows it runs"
        model = read_model(path, config, dtype)
        torch.nn.Module.to(model, device)  # in place
        return Bridge(model, max_context=max_context)
    except ModelLoadError as error:
        raise error if str(path) in error.message else ModelLoadError(f"{path}: {error.message}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelLoadError(f"{path}: the weights do not fit into the memory of {device}") from error


def _generation_defaults(raw: Mapping[str, Any]) -> GenerationDefaults:
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    return GenerationDefaults(**{name: raw[name] for name in names if isinstance(raw.get(name), (int, float))})


def _token_ids(value: Any, path: Path) -> frozenset[int]:
    """eos_token_id is absent, a number, or a list of numbers."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise ModelLoadError(f"{path}: eos_token_id {value!r} is no token id")
    return frozenset(ids)


def _check_max_context(settings: ModelSettings, config: Config, path: Path) -> None:
    text_config = config.get_text_config()
    own = getattr(text_config, "max_position_embeddings", None) or getattr(text_config, "n_positions", None)
    if own is not None and settings.max_context is not None and settings.max_context > own:
        raise ModelLoadError(f"model.max_context is {settings.max_context}, but {path} has a context of {own} tokens")


def _vocabulary_size(config: Config) -> int:
    return int(config.get_text_config().vocab_size)
