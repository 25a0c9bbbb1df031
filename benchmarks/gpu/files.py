"""A model with random weights as safetensors files, for the time that reading them takes. It knows no tokenizer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.models import SHAPES, Loaded, RandomWeights, synchronize
from hotgraph_server.models.checkpoint import INDEX, open_checkpoint
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.json_file import read_json
from hotgraph_server.models.loader import CONFIG, choose_config

SHARD_BYTES = 2 << 30


def write_folder(folder: Path, config_name: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """Writes the weights that `make_loaded` would make, in shards of about 2 GiB, and their index. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = RandomWeights(SHAPES[config_name], dtype=dtype, device=device)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    num_shards = 0

    def flush() -> None:
        nonlocal num_shards
        num_shards += 1
        name = f"model-{num_shards:05d}.safetensors"
        save_file(shard, folder / name)
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name in weights:
        shard[name] = weights[name].cpu()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / INDEX).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    (folder / CONFIG).write_text(SHAPES[config_name].config().to_json_string(use_diff=False), encoding="utf-8")


def load_folder(folder: Path, config_name: str, *, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Our decoder from such files, as the daemon reads a model's. Raises ModelLoadError."""
    begin_seconds = time.perf_counter()
    config = choose_config(read_json(folder / CONFIG), folder / CONFIG, is_plain=True)
    model = Decoder.from_config(config, open_checkpoint(folder), dtype=dtype, device=device, max_context=None)
    synchronize(device)
    return Loaded(model, f"random-{config_name}", time.perf_counter() - begin_seconds)
