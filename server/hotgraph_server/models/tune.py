"""Tunes the kernels of few rows for a model on this host's GPU, and stores what was found. No daemon runs it.

It knows which sizes a model has; how they are tuned, `kernels/tuner.py` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from graphcache import Clock, SystemClock
from hotgraph_server.config import ModelSettings
from hotgraph_server.errors import NotPossibleError
from hotgraph_server.kernels import tile_rows
from hotgraph_server.kernels.few_rows_cuts import MAX_ROWS, row_class
from hotgraph_server.kernels.tuner import Bench, Report, Tuned, tune_chain
from hotgraph_server.kernels.tuner_gpu import GpuBench
from hotgraph_server.kernels.tuning import ChainShape, Machine, cache_folder, store_table
from hotgraph_server.models.few_rows_layers import MAX_TOKENS, can_take, chain_shape
from hotgraph_server.models.loader import read_sizes
from hotgraph_server.models.tile_rows_layers import least_tokens

MakeBench = Callable[[ChainShape, torch.device], AbstractContextManager[Bench]]


def served_rows(chain: ChainShape, device: torch.device) -> tuple[int, ...]:
    """The row classes that a decoder of these sizes takes these kernels for."""
    num_rows = min(MAX_TOKENS, MAX_ROWS)
    if tile_rows.runs_on(device):
        layer_bytes = sum(product.num_bytes for name, product in chain.products.items() if name != "head")
        num_rows = min(num_rows, least_tokens(layer_bytes) - 1)
    return tuple(sorted({row_class(rows) for rows in range(1, num_rows + 1)}))


@dataclass(frozen=True, slots=True)
class StoredTunings:
    """What a run found, for which machine, and where it stands now."""

    tuned: Tuned
    machine: Machine
    path: Path


def tune(
    settings: ModelSettings,
    *,
    rows: Sequence[int] | None = None,
    seconds: float = 60.0,
    output: Path | None = None,
    report: Report = lambda stage, done, total: None,
    clock: Clock | None = None,
    bench: MakeBench = GpuBench,
) -> StoredTunings:
    """Tunes for the model's sizes, within about so many seconds, and stores the table where the daemon looks, or in `output`.

    rows: row classes; None: those of `served_rows`. A table that is there already keeps what it has of other products. Raises
    NotPossibleError when there is nothing to tune here, ModelLoadError for the model, OSError when the table cannot be written.
    """
    sizes = read_sizes(settings)
    if sizes is None:
        raise NotPossibleError("this model runs through transformers, whose kernels are not ours to tune")
    if sizes.device.type != "cuda":
        raise NotPossibleError("tuning needs an NVIDIA GPU, and there is none here")
    if not can_take(sizes.shape, sizes.dtype, sizes.device):
        name = torch.cuda.get_device_name(sizes.device)
        raise NotPossibleError(f"on {name} in {sizes.dtype} this model does not take the kernels that are tuned")
    machine = Machine.of(sizes.device)
    chain = chain_shape(sizes.shape, sizes.dtype, sizes.num_turned)
    path = output or cache_folder() / machine.file_name
    path.parent.mkdir(parents=True, exist_ok=True)  # whether we may: known before the work, not after it
    try:
        with torch.cuda.device(sizes.device), bench(chain, sizes.device) as made:
            wanted = served_rows(chain, sizes.device) if rows is None else rows
            tuned = tune_chain(made, wanted, seconds=seconds, clock=clock or SystemClock(), report=report)
    except torch.OutOfMemoryError as error:
        raise NotPossibleError("the GPU has no room for layers to measure with; is another process on it?") from error
    store_table(path, machine, tuned.table)
    return StoredTunings(tuned, machine, path)
