"""What the paper's commands share: the arguments, the report, and the models, made when they are first asked for."""

from __future__ import annotations

import argparse
import gc
import random

import torch
from transformers import PreTrainedModel

from benchmarks.gpu.models import SHAPES, Loaded, make_loaded, make_transformers, random_prompt
from benchmarks.gpu.report import Report, device_of, dtype_of, run_ahead_of
from benchmarks.paper.tables import Table


class Bench:
    """One run of one command."""

    def __init__(self, arguments: argparse.Namespace, report: Report) -> None:
        self.arguments = arguments
        self.report = report
        self.device = device_of(arguments)
        self.dtype = dtype_of(arguments)
        self.run_ahead = run_ahead_of(arguments)
        self._loaded: Loaded | None = None
        self._transformers: PreTrainedModel | None = None
        report.results["tables"] = []

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def gap_seconds(self) -> float:
        """Between lone requests."""
        return float(self.arguments.gap_ms) / 1e3

    def loaded(self) -> Loaded:
        """Our decoder."""
        if self._loaded is None:
            self._loaded = make_loaded(self.arguments.config, device=self.device, dtype=self.dtype)
        return self._loaded

    def transformers(self) -> PreTrainedModel:
        """transformers' model of the same weights."""
        if self._transformers is None:
            self._transformers = make_transformers(self.arguments.config, device=self.device, dtype=self.dtype)
        return self._transformers

    def prompt(self, num_tokens: int, index: int) -> tuple[int, ...]:
        """The random prompt of this length and number: the same for every mode."""
        source = random.Random(f"{self.arguments.seed} {num_tokens} {index}")
        return random_prompt(num_tokens, SHAPES[self.arguments.config].sizes["vocab_size"], source)

    def add_table(self, table: Table) -> None:
        self.report.results["tables"].append(table.to_dict())

    def drop_models(self) -> None:
        """Gives their memory back; they are made again when asked for."""
        self._loaded = self._transformers = None
        self.free()

    def free(self) -> None:
        """Gives back what nothing refers to any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
