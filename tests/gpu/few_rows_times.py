"""Times of products for few rows on a GPU, at the sizes of a 7B Llama: tunings, torch's own call, and whole layers in a chain.

Weights of several layers are read in turn, so that none is found in the cache. All times are of graphs, without the host; the
clock and the tunings are those of the tuner (`kernels/tuner.py`).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from hotgraph_server.kernels.activation import gated_activation
from hotgraph_server.kernels.few_rows_cuts import Tuning, row_class
from hotgraph_server.kernels.few_rows_triton import few_rows_linear_triton, few_rows_qkv_triton
from hotgraph_server.kernels.norm import add_rms_norm, rms_norm
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.rope_kv import rope_and_write_kv
from hotgraph_server.kernels.tuner import candidates
from hotgraph_server.kernels.tuner_gpu import NUM_REPLAYS, graph_seconds
from hotgraph_server.kernels.tuning import ProductShape

HIDDEN, INTERMEDIATE, NUM_LAYERS = 4096, 11008, 8
NUM_HEADS, HEAD_DIM = 32, 128
MODEL_LAYERS = 32


@dataclass(frozen=True)
class Projection:
    """One of a layer's products."""

    name: str
    num_inputs: int
    num_outputs: int
    is_gated: bool = False
    is_normed: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the weight."""
        return self.shape.num_bytes

    @property
    def shape(self) -> ProductShape:
        """As the tuner has it."""
        num_weight_rows = self.num_outputs * (2 if self.is_gated else 1)
        return ProductShape(num_weight_rows, self.num_inputs, self.is_gated, self.is_normed, "float16")


PROJECTIONS = (
    Projection("qkv", HIDDEN, 3 * HIDDEN, is_normed=True),
    Projection("o", HIDDEN, HIDDEN),
    Projection("gate_up", HIDDEN, INTERMEDIATE, is_gated=True, is_normed=True),
    Projection("down", INTERMEDIATE, HIDDEN),
)


class Tensors:
    """What one projection reads and writes at `num_rows` rows, on any device; weights of `num_layers` layers."""

    def __init__(self, projection: Projection, num_rows: int, device: str, num_layers: int) -> None:
        def draw(*size: int) -> torch.Tensor:
            if device == "cpu":  # only compiled for
                return torch.empty(size, dtype=torch.float16)
            return torch.randn(size, dtype=torch.float16, device=device)

        rows = projection.num_outputs * (2 if projection.is_gated else 1)
        self.projection = projection
        self.weights = [draw(rows, projection.num_inputs) for _ in range(num_layers)]
        if device != "cpu":
            for weight in self.weights:
                weight.mul_(projection.num_inputs**-0.5)
        self.norm = draw(projection.num_inputs)
        self.resize(num_rows)

    def resize(self, num_rows: int) -> None:
        """Other rows, the same weights."""
        x = self.norm.new_empty(num_rows, self.projection.num_inputs)
        self.x = x if x.device.type == "cpu" else x.normal_()
        self.normed = torch.empty_like(x)
        self.update = torch.zeros_like(x)
        self.out = x.new_zeros(num_rows, self.projection.num_outputs)
        self.wide = x.new_zeros(num_rows, self.projection.num_outputs * (2 if self.projection.is_gated else 1))
        self.query = x.new_zeros(num_rows, NUM_HEADS, HEAD_DIM)
        self.cache = x.new_zeros(2, 2, 16, NUM_HEADS, HEAD_DIM)
        self.places = torch.arange(num_rows, device=x.device)
        self.rope = RopePlan(torch.ones(64, HEAD_DIM, device=x.device), self.places, None)

    def run(self, layer: int, tuning: Tuning | None, *, pdl: bool) -> None:
        """Our kernels."""
        projection = self.projection
        is_last = not projection.is_gated and not projection.is_normed
        few_rows_linear_triton(
            self.x,
            self.weights[layer],
            self.out,
            norm=self.norm if projection.is_normed else None,
            epsilon=1e-5,
            normed=self.normed,
            activation="silu" if projection.is_gated else None,
            residual=self.out if is_last else None,
            pdl=pdl,
            tuning=tuning,
        )

    def run_with_rope(self, layer: int, tuning: Tuning | None, *, pdl: bool) -> None:
        """Our kernel of queries, keys and values, with rope and the write to the cache behind the product."""
        few_rows_qkv_triton(
            self.x,
            self.weights[layer],
            self.rope,
            self.places,
            self.cache[0],
            self.cache[1],
            self.query,
            norm=self.norm,
            epsilon=1e-5,
            normed=self.normed,
            pdl=pdl,
            tuning=tuning,
        )

    def run_separately(self, layer: int) -> None:
        """cuBLAS, and the kernels that stand beside it."""
        x = self.x
        if self.projection.is_normed:
            x = add_rms_norm(self.x, self.update, self.norm, 1e-5, self.normed)
        torch.mm(x, self.weights[layer].t(), out=self.wide)
        if self.projection.is_gated:
            gated_activation(self.wide, "silu", self.out)


def rule(projection: Projection, num_rows: int) -> Tuning:
    """What is taken without being told."""
    return projection.shape.rule(num_rows)


def tries_of(projection: Projection, num_rows: int, *, sweeps: bool) -> list[Tuning]:
    """The rule's and, with `sweeps`, all that the tuner tries."""
    return candidates(projection.shape, row_class(num_rows)) if sweeps else [rule(projection, num_rows)]


def compile_one(variant: tuple[Projection, int, Tuning, bool]) -> None:
    """In a process without a GPU: leaves the kernel in Triton's cache on disk."""
    import pytest

    from tests.server.kernels.compiler import compile_launches

    projection, num_rows, tuning, pdl = variant
    with pytest.MonkeyPatch.context() as patch:
        compile_launches(patch)
        tensors = Tensors(projection, num_rows, "cpu", 1)
        tensors.run(0, tuning, pdl=pdl)
        if projection.name == "qkv" and tuning == rule(projection, num_rows):
            tensors.run_with_rope(0, tuning, pdl=pdl)


def compile_all(variants: Sequence[tuple[Projection, int, Tuning, bool]]) -> None:
    """On all cores."""
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 32), mp_context=multiprocessing.get_context("spawn")) as executor:
        list(executor.map(compile_one, variants, chunksize=4))


def graph_microseconds(works: Sequence[Callable[[], object]], *, num_replays: int = NUM_REPLAYS) -> float:
    """Of all works together, one after the other in one graph: the median of replays."""

    def run() -> None:
        for work in works:
            work()

    for work in works[:8]:
        work()
    return graph_seconds(run, torch.device("cuda"), num_replays=num_replays) * 1e6


def projection_times(
    tensors: Tensors, tries: Sequence[Tuning], *, num_launches: int = 24
) -> tuple[list[tuple[float, Tuning]], float, float]:
    """Microseconds of each tuning in a chain with PDL, best first; of torch and separate kernels; of torch's product alone."""

    def chain(work: Callable[[int], object]) -> float:
        works = [functools.partial(work, index % NUM_LAYERS) for index in range(num_launches)]
        return graph_microseconds(works) / num_launches

    found = [(chain(functools.partial(_run_tuned, tensors, tuning)), tuning) for tuning in tries]
    separate = chain(tensors.run_separately)
    alone = chain(lambda layer: torch.mm(tensors.x, tensors.weights[layer].t(), out=tensors.wide))
    return sorted(found, key=lambda pair: pair[0]), separate, alone


def _run_tuned(tensors: Tensors, tuning: Tuning, layer: int) -> None:
    tensors.run(layer, tuning, pdl=True)


class Chain:
    """The kernels of layers in their order, each reading what the one before wrote; only attention is left out."""

    def __init__(self, by_name: dict[str, Tensors], num_rows: int) -> None:
        for tensors in by_name.values():
            tensors.resize(num_rows)
        self._of = by_name
        self._qkv = by_name["qkv"]
        self._hidden = self._qkv.x
        self._attended = self._qkv.query.flatten(1)
        self._gated = by_name["down"].x
        self._update = torch.zeros_like(self._hidden)
        self._normed = self._qkv.normed
        self._wide = by_name["gate_up"].wide

    def milliseconds(self, tuning_of: dict[str, Tuning] | None, *, pdl: bool = False) -> float:
        """Of 32 layers; without tunings of torch's products and separate kernels."""
        work = self._layer if tuning_of is None else functools.partial(self._fused_layer, tuning_of, pdl)
        self._hidden.normal_()
        works = [functools.partial(work, layer) for layer in range(NUM_LAYERS)]
        return graph_microseconds(works) * MODEL_LAYERS / NUM_LAYERS / 1000

    def _fused_layer(self, tuning_of: dict[str, Tuning], pdl: bool, layer: int) -> None:
        def product(name: str, x: torch.Tensor, out: torch.Tensor, **options: Any) -> None:
            weight = self._of[name].weights[layer]
            few_rows_linear_triton(x, weight, out, pdl=pdl, tuning=tuning_of[name], **options)

        norm = {"norm": self._qkv.norm, "epsilon": 1e-5, "normed": self._normed}
        self._qkv.run_with_rope(layer, tuning_of["qkv"], pdl=pdl)
        product("o", self._attended, self._hidden, residual=self._hidden)
        product("gate_up", self._hidden, self._gated, activation="silu", **norm)
        product("down", self._gated, self._hidden, residual=self._hidden)

    def _layer(self, layer: int) -> None:
        def weight(name: str) -> torch.Tensor:
            return self._of[name].weights[layer].t()

        qkv, norm = self._qkv, self._qkv.norm
        if layer == 0:
            rms_norm(self._hidden, norm, 1e-5, self._normed)
        torch.mm(self._normed, weight("qkv"), out=qkv.wide)
        rope_and_write_kv(qkv.wide, qkv.rope, qkv.places, qkv.cache[0], qkv.cache[1], out=qkv.query)
        torch.mm(self._attended, weight("o"), out=self._update)
        add_rms_norm(self._hidden, self._update, norm, 1e-5, self._normed)
        torch.mm(self._normed, weight("gate_up"), out=self._wide)
        gated_activation(self._wide, "silu", self._gated)
        torch.mm(self._gated, weight("down"), out=self._update)
        add_rms_norm(self._hidden, self._update, norm, 1e-5, self._normed)


def measure(row_counts: Sequence[int], *, sweeps: bool) -> dict[str, Any]:
    """All times, as JSON takes them; prints a table. Without `sweeps` only the tunings of the rule are timed."""
    kernels_of = {1: 1, 2: 2} | dict.fromkeys(range(3, 9), 8) | dict.fromkeys(range(9, 17), 16)
    kinds = sorted({kernels_of[num_rows] for num_rows in row_counts})
    variants = [
        (projection, num_rows, tuning, True)
        for projection in PROJECTIONS
        for num_rows in kinds
        for tuning in tries_of(projection, num_rows, sweeps=sweeps)
    ]
    variants += [(p, num_rows, rule(p, num_rows), False) for p in PROJECTIONS for num_rows in kinds]
    compile_all(variants)
    by_name = {p.name: Tensors(p, 1, "cuda", NUM_LAYERS) for p in PROJECTIONS}
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "projections": [], "chains": []}
    print(f"\n{result['device']}; microseconds (TB/s); 'separate' is torch's product with the kernels beside it")
    for num_rows in row_counts:
        best: dict[str, Tuning] = {}
        for projection in PROJECTIONS:
            tensors = by_name[projection.name]
            tensors.resize(num_rows)
            own = rule(projection, num_rows)
            found, separate, alone = projection_times(tensors, tries_of(projection, num_rows, sweeps=sweeps))
            microseconds, best[projection.name] = found[0]
            of_rule = next(time for time, tuning in found if tuning == own)
            print(
                f"  rows {num_rows:2} {projection.name:8} "
                f"best {microseconds:6.2f} ({projection.num_bytes / microseconds / 1e6:.2f})  "
                f"rule {of_rule:6.2f} ({projection.num_bytes / of_rule / 1e6:.2f})  "
                f"separate {separate:6.2f}  torch {alone:6.2f} ({projection.num_bytes / alone / 1e6:.2f})  {found[0][1]}"
            )
            result["projections"].append(
                {
                    "rows": num_rows,
                    "name": projection.name,
                    "separate_us": separate,
                    "torch_us": alone,
                    "rule_us": of_rule,
                    "found": [{"us": time, "tuning": str(tuning)} for time, tuning in found],
                }
            )
        chain = Chain(by_name, num_rows)
        ruled = {p.name: rule(p, num_rows) for p in PROJECTIONS}
        times = {
            "rule with PDL": chain.milliseconds(ruled, pdl=True),
            "rule without PDL": chain.milliseconds(ruled),
            "best with PDL": chain.milliseconds(best, pdl=True),
            "torch and separate kernels": chain.milliseconds(None),
        }
        text = ", ".join(f"{name} {time:.3f}" for name, time in times.items())
        print(f"  rows {num_rows:2} chain of {MODEL_LAYERS} layers without attention, ms: {text}")
        result["chains"].append({"rows": num_rows, **times})
    return result
