"""Times of products for 3 to 64 rows on a GPU, at the sizes of a 7B Llama: tunings, torch's own call, and layers in a chain.

`python -m tests.gpu.tile_rows_times OUT.json` prints a table and writes all of it. Weights of several layers are read in turn,
so that none is found in the cache. All times are of graphs, without the host.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hotgraph_server.kernels.activation import gated_activation
from hotgraph_server.kernels.norm import add_rms_norm, rms_norm
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.rope_kv import rope_and_write_kv
from hotgraph_server.kernels.tile_rows_cuts import TileTuning, room_for, tuned
from hotgraph_server.kernels.tile_rows_triton import tile_rows_linear_triton, tile_rows_qkv_triton

ROWS = (8, 16, 32, 64)
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
NUM_HEADS, HEAD_DIM = 32, 128
MODEL_LAYERS, NUM_LAYERS = 32, 8
NUM_LAUNCHES = 24
EPSILON = 1e-5


@dataclass(frozen=True)
class Projection:
    """One of the products. num_weights: matrices that are read in turn, more than the cache holds."""

    name: str
    num_inputs: int
    num_outputs: int
    is_gated: bool = False
    is_normed: bool = False
    num_weights: int = NUM_LAYERS

    @property
    def num_weight_rows(self) -> int:
        """Gates and what they gate are two."""
        return self.num_outputs * (2 if self.is_gated else 1)

    def microseconds_and_rate(self, microseconds: float) -> str:
        """With the TB/s at which the weight was read."""
        return f"{microseconds:6.2f} ({2 * self.num_inputs * self.num_weight_rows / microseconds / 1e6:.2f})"

    def rule(self, num_rows: int) -> TileTuning:
        """What is taken without being told."""
        return tuned(
            num_rows,
            self.num_weight_rows,
            self.num_inputs,
            is_gated=self.is_gated,
            is_normed=self.is_normed,
            head_dim=HEAD_DIM if self.name == "qkv" else 0,
        )


LAYER = (
    Projection("qkv", HIDDEN, 3 * HIDDEN, is_normed=True),
    Projection("o", HIDDEN, HIDDEN),
    Projection("gate_up", HIDDEN, INTERMEDIATE, is_gated=True, is_normed=True),
    Projection("down", INTERMEDIATE, HIDDEN),
)
HEAD = Projection("head", HIDDEN, VOCABULARY, is_normed=True, num_weights=2)
PROJECTIONS = (*LAYER, HEAD)


class Model:
    """The weights, and what goes from product to product for so many rows, on any device."""

    def __init__(self, projections: Sequence[Projection], num_rows: int, device: str) -> None:
        self._device = torch.device(device)
        self.projections = {projection.name: projection for projection in projections}
        self.weights = {
            p.name: [self._draw(p.num_weight_rows, p.num_inputs).mul_(p.num_inputs**-0.5) for _ in range(p.num_weights)]
            for p in projections
        }
        self.norm = self._draw(HIDDEN)
        self.resize(num_rows)

    def _draw(self, *size: int) -> torch.Tensor:
        if self._device.type == "cpu":  # only compiled for
            return torch.empty(size, dtype=torch.float16)
        return torch.randn(size, dtype=torch.float16, device=self._device)

    def resize(self, num_rows: int) -> None:
        """Other rows, the same weights."""
        self.hidden, self.attended = self._draw(num_rows, HIDDEN), self._draw(num_rows, HIDDEN)
        self.gated = self._draw(num_rows, INTERMEDIATE)
        self.normed, self.update = torch.empty_like(self.hidden), torch.zeros_like(self.hidden)
        self.query = self.hidden.new_zeros(num_rows, NUM_HEADS, HEAD_DIM)
        self.cache = self.hidden.new_zeros(2, 4, 16, NUM_HEADS, HEAD_DIM)
        self.logits = self.hidden.new_zeros(num_rows, VOCABULARY, dtype=torch.float32)
        self.wide = {p.name: self.hidden.new_zeros(num_rows, p.num_weight_rows) for p in self.projections.values()}
        self.places = torch.arange(num_rows, device=self._device)
        self.rope = RopePlan(torch.ones(64, HEAD_DIM, device=self._device), self.places, None)

    def _weight(self, name: str, layer: int) -> torch.Tensor:
        weights = self.weights[name]
        return weights[layer % len(weights)]

    def run(self, name: str, tuning: TileTuning, layer: int, *, pdl: bool) -> None:
        """Our kernel, with all that stands around the product."""
        weight = self._weight(name, layer)
        options: dict[str, Any] = {"pdl": pdl, "tuning": tuning}
        norm: dict[str, Any] = {"norm": self.norm, "epsilon": EPSILON, "normed": self.normed}
        hidden = self.hidden
        if name == "qkv":
            keys, values = self.cache
            tile_rows_qkv_triton(hidden, weight, self.rope, self.places, keys, values, self.query, **norm, **options)
        elif name == "o":
            tile_rows_linear_triton(self.query.flatten(1), weight, hidden, residual=hidden, **options)
        elif name == "gate_up":
            tile_rows_linear_triton(hidden, weight, self.gated, activation="silu", **norm, **options)
        elif name == "down":
            tile_rows_linear_triton(self.gated, weight, hidden, residual=hidden, **options)
        else:
            tile_rows_linear_triton(hidden, weight, self.logits, **norm, **options)

    def run_alone(self, name: str, layer: int) -> None:
        """torch's product."""
        x = {"qkv": self.normed, "o": self.attended, "gate_up": self.normed, "down": self.gated, "head": self.normed}
        torch.mm(x[name], self._weight(name, layer).t(), out=self.wide[name])

    def run_separately(self, name: str, layer: int) -> None:
        """torch's product, and the kernels that stand around it."""
        if name in {"o", "down"}:
            x = self.query.flatten(1) if name == "o" else self.gated
            torch.mm(x, self._weight(name, layer).t(), out=self.update)
            add_rms_norm(self.hidden, self.update, self.norm, EPSILON, self.normed)
            return
        if name == "head":
            rms_norm(self.hidden, self.norm, EPSILON, self.normed)
        self.run_alone(name, layer)
        if name == "qkv":
            keys, values = self.cache
            rope_and_write_kv(self.wide[name], self.rope, self.places, keys, values, out=self.query)
        elif name == "gate_up":
            gated_activation(self.wide[name], "silu", self.gated)
        else:
            self.logits.copy_(self.wide[name])


def tunings(projection: Projection) -> Iterator[TileTuning]:
    """What is tried: from 32 to 144 KiB in flight a program."""
    for block_rows, parts, num_stages, num_warps in (
        (64, 1, 4, 4),
        (64, 1, 6, 4),
        (64, 1, 9, 4),
        (64, 2, 3, 4),
        (64, 2, 4, 4),
        (64, 2, 6, 4),
        (128, 1, 4, 8),
        (128, 1, 6, 8),
        (128, 1, 6, 4),
        (128, 2, 3, 8),
    ):
        yield TileTuning(block_rows, parts, num_stages, num_warps)
    if projection.is_normed:
        yield TileTuning(64, parts=2, num_stages=4, triggers_late=False)
    else:
        yield TileTuning(32, parts=2, num_stages=6)
        yield TileTuning(64, parts=4, num_stages=4)


def tries_of(projection: Projection, num_rows: int, *, sweeps: bool) -> list[TileTuning]:
    """The rule's and, with `sweeps`, all others."""
    own = projection.rule(num_rows)
    return list(dict.fromkeys([own, *(tunings(projection) if sweeps else ())]))


def compile_one(variant: tuple[Projection, int, TileTuning, bool]) -> None:
    """In a process without a GPU: leaves the kernel in Triton's cache on disk."""
    import pytest

    from tests.server.kernels.compiler import compile_launches

    projection, num_rows, tuning, pdl = variant
    with pytest.MonkeyPatch.context() as patch:
        compile_launches(patch)
        Model([replace(projection, num_weights=1)], num_rows, "cpu").run(projection.name, tuning, 0, pdl=pdl)


def compile_all(variants: Sequence[tuple[Projection, int, TileTuning, bool]]) -> None:
    """On all cores."""
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 32), mp_context=multiprocessing.get_context("spawn")) as executor:
        list(executor.map(compile_one, variants, chunksize=4))


def graph_microseconds(works: Sequence[Callable[[], object]], *, num_replays: int = 7) -> float:
    """Of all works together, one after the other in one graph: the median of replays."""
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    times: list[float] = []
    for _ in range(num_replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def _of_one(work: Callable[[int], object]) -> float:
    """Microseconds of one among many, each with the next layer's weight."""
    return graph_microseconds([functools.partial(work, layer) for layer in range(NUM_LAUNCHES)]) / NUM_LAUNCHES


def _of_layers(model: Model, work: Callable[[str, int], object]) -> float:
    """Milliseconds of 32 layers without attention, each kernel reading what the one before wrote."""
    model.hidden.normal_()
    works = [functools.partial(work, p.name, layer) for layer in range(NUM_LAYERS) for p in LAYER]
    return graph_microseconds(works) * MODEL_LAYERS / NUM_LAYERS / 1000


def _chain_times(model: Model, ruled: Mapping[str, TileTuning], best: Mapping[str, TileTuning]) -> dict[str, float]:
    def ours(of: Mapping[str, TileTuning], *, pdl: bool) -> float:
        return _of_layers(model, lambda name, layer: model.run(name, of[name], layer, pdl=pdl))

    return {
        "rule with PDL": ours(ruled, pdl=True),
        "rule without PDL": ours(ruled, pdl=False),
        "best with PDL": ours(best, pdl=True),
        "torch and separate kernels": _of_layers(model, model.run_separately),
    }


def _product_times(model: Model, projection: Projection, num_rows: int, *, sweeps: bool) -> dict[str, Any]:
    """`found` is sorted, best first."""
    name = projection.name

    def ours(tuning: TileTuning) -> float:
        return _of_one(lambda layer: model.run(name, tuning, layer, pdl=True))

    model.hidden.normal_()
    tries = tries_of(projection, num_rows, sweeps=sweeps)
    found = sorted(((ours(tuning), tuning) for tuning in tries), key=lambda pair: pair[0])
    return {
        "rows": num_rows,
        "name": name,
        "rule_us": next(time for time, tuning in found if tuning == tries[0]),
        "separate_us": _of_one(functools.partial(model.run_separately, name)),
        "torch_us": _of_one(functools.partial(model.run_alone, name)),
        "found": found,
    }


def measure(row_counts: Sequence[int], *, sweeps: bool) -> dict[str, Any]:
    """All times, as JSON takes them; prints a table. Without `sweeps` only the tunings of the rule are timed."""
    rooms = sorted({room_for(num_rows, is_normed=True) for num_rows in row_counts})
    variants = [
        (projection, room, tuning, True)
        for projection in PROJECTIONS
        for room in rooms
        for tuning in tries_of(projection, room, sweeps=sweeps)
    ]
    variants += [(p, room, p.rule(room), False) for p in LAYER for room in rooms]
    compile_all(variants)
    model = Model(PROJECTIONS, 1, "cuda")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "projections": [], "chains": []}
    print(f"\n{result['device']}; microseconds (TB/s); 'separate' is torch's product with the kernels beside it")
    for num_rows in row_counts:
        model.resize(num_rows)
        best: dict[str, TileTuning] = {}
        for projection in PROJECTIONS:
            times = _product_times(model, projection, num_rows, sweeps=sweeps)
            microseconds, best[projection.name] = times["found"][0]
            shown = projection.microseconds_and_rate
            print(
                f"  rows {num_rows:2} {projection.name:8} best {shown(microseconds)}  rule {shown(times['rule_us'])}  "
                f"separate {times['separate_us']:6.2f}  torch {shown(times['torch_us'])}  {best[projection.name]}"
            )
            times["found"] = [{"us": time, "tuning": str(tuning)} for time, tuning in times["found"]]
            result["projections"].append(times)
        ruled = {p.name: p.rule(num_rows) for p in LAYER}
        chain = _chain_times(model, ruled, best)
        text = ", ".join(f"{name} {time:.3f}" for name, time in chain.items())
        print(f"  rows {num_rows:2} chain of {MODEL_LAYERS} layers without attention, ms: {text}")
        result["chains"].append({"rows": num_rows, **chain})
    return result


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(ROWS, sweeps=True), indent=1), encoding="utf-8")
