"""Reads a model as transformers has it, for the bridge: whole, from safetensors or GGUF, and without any code of the folder's.

It knows no cache and no steps. transformers fills in weights it does not find with random numbers; here that is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from hotgraph_server.errors import ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def read_gguf_config(path: Path) -> PreTrainedConfig:
    """The configuration of a GGUF file of any architecture that transformers can read. Raises ModelLoadError."""
    from transformers import AutoConfig  # slow to import

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever other people's code raises for a file it cannot make sense of
        raise ModelLoadError(f"{path}: transformers cannot read it either ({first_line(error)})") from error
    return config


def read_model(path: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `dtype` on the CPU. `path` is a folder with safetensors or a GGUF file. Raises ModelLoadError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call] # a daemon's log is no terminal
    arguments: dict[str, Any] = {"config": config, "dtype": dtype, "local_files_only": True, "trust_remote_code": False}
    if path.is_dir():
        arguments |= {"pretrained_model_name_or_path": str(path), "use_safetensors": True}
    else:
        arguments |= {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Wrong sizes are let through only to be named below.
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    load: Any = AutoModelForCausalLM.from_pretrained  # its stated type does not know of the second result
    try:
        model, report = load(**arguments)
    except Exception as error:  # as above
        raise ModelLoadError(f"{path}: transformers cannot load it ({first_line(error)})") from error
    # Keys come as names, or as names with both shapes.
    for fault, said in (("missing_keys", "is missing"), ("mismatched_keys", "has a wrong shape")):
        if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get(fault) or ()):
            raise ModelLoadError(f"{path}: tensor {names[0]} {said} ({len(names)} in all)")
    return cast("PreTrainedModel", model)


def first_line(error: BaseException) -> str:
    """What an error says, in one line: other people's errors can be pages."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
