"""The models: their computation, their files, their tokenizers, and the ones that can be fetched by name.

Names are imported when they are first used: looking at the list of models should not cost the import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hotgraph_server.models.interface import KvTensors, LayerKv, Model, StepTensors
    from hotgraph_server.models.loader import GenerationDefaults, LoadedModel, load_model
    from hotgraph_server.models.registry import (
        EMBEDDED,
        EmbeddedModel,
        ModelInfo,
        cache_folder,
        info,
        list_models,
        pull,
        verify,
    )
    from hotgraph_server.models.tokenizer import HuggingFaceTokenizer

__all__ = [
    "EMBEDDED",
    "EmbeddedModel",
    "GenerationDefaults",
    "HuggingFaceTokenizer",
    "KvTensors",
    "LayerKv",
    "LoadedModel",
    "Model",
    "ModelInfo",
    "StepTensors",
    "cache_folder",
    "info",
    "list_models",
    "load_model",
    "pull",
    "verify",
]

_ROOMS = {
    "interface": ("KvTensors", "LayerKv", "Model", "StepTensors"),
    "loader": ("GenerationDefaults", "LoadedModel", "load_model"),
    "registry": (
        "EMBEDDED",
        "EmbeddedModel",
        "ModelInfo",
        "cache_folder",
        "info",
        "list_models",
        "pull",
        "verify",
    ),
    "tokenizer": ("HuggingFaceTokenizer",),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
