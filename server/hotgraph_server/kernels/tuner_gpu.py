"""The bench of `tuner.py` on a GPU: a chain of products over several layers' random weights, timed as a graph, and checked.

It knows the kernels of `few_rows.py` as a decoder launches them; attention alone is left out, and what it would give is there
already. So many layers are read in turn that none is found in the cache. Times are the device's own, between events around
replays of a graph that wait for nothing from the host.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hotgraph_server.kernels.few_rows import few_rows_qkv_reference, few_rows_reference
from hotgraph_server.kernels.few_rows_cuts import Tuning
from hotgraph_server.kernels.few_rows_triton import few_rows_linear_triton, few_rows_qkv_triton
from hotgraph_server.kernels.rope import RopePlan, rotary_table
from hotgraph_server.kernels.tuner import Choices, Report
from hotgraph_server.kernels.tuner_compile import CompilePool
from hotgraph_server.kernels.tuning import ChainShape

CHAIN_BYTES = 2 << 30
"""Of weights that a chain reads, if the model has as many: far more than a cache holds, and half a millisecond on an H200."""

LONE_LAUNCHES = 24
NUM_REPLAYS = 9
EPSILON = 1e-5

_CACHE_SLOTS = 16
_HEAD_BYTES = 256 << 20  # of copies of the head, so that it is not found in the cache when it is read again and again
# Norm of the difference over norm: roundings to 11 and 8 bits, up to three in a row.
_TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Numbers of rows whose results are looked at, for each row class.
_CHECKED_ROWS = {1: (1,), 2: (2,), 8: (3, 8), 16: (9, 16)}


class Chain:
    """The tensors of a chain of products, and its launches. On the CPU, which is for compiling, they hold no numbers."""

    def __init__(
        self, shape: ChainShape, device: torch.device, *, num_layers: int, names: Sequence[str] | None = None
    ) -> None:
        """names: the products whose weights are made; None: of all."""
        self.shape = shape
        self.num_layers = num_layers
        self._device = device
        self._products = shape.products
        self.weights: dict[str, list[torch.Tensor]] = {}
        for name in names or self._products:
            product = self._products[name]
            copies = min(-(-_HEAD_BYTES // product.num_bytes), num_layers) if name == "head" else num_layers
            size, scale = (product.num_weight_rows, product.num_inputs), product.num_inputs**-0.5
            self.weights[name] = [self._drawn(*size, scale=scale) for _ in range(copies)]
        self.norm = self._drawn(shape.hidden_size)
        self.resize(1)

    def resize(self, num_rows: int) -> None:
        """Room for other rows; the weights stay."""
        shape, width = self.shape, self.shape.num_heads * self.shape.head_dim
        self.hidden = self._drawn(num_rows, shape.hidden_size)
        self.attended = self._drawn(num_rows, width)
        self.gated = self._drawn(num_rows, shape.intermediate_size)
        self.normed = torch.empty_like(self.hidden)
        self.query = torch.empty_like(self.attended).view(num_rows, shape.num_heads, shape.head_dim)
        self.qkv = self.hidden.new_empty(num_rows, self._products["qkv"].num_weight_rows)
        self.logits = self.hidden.new_empty(num_rows, shape.vocabulary_size, dtype=torch.float32)
        self.cache = self.hidden.new_zeros(2, 1, _CACHE_SLOTS, shape.num_kv_heads, shape.head_dim)
        self.slots = torch.arange(num_rows, device=self._device)
        frequencies = 1 / torch.arange(1.0, 1 + shape.head_dim // 2, device=self._device)
        self.rope = RopePlan.for_step(rotary_table(frequencies, 1.0, _CACHE_SLOTS), self.slots, shape.dtype)

    def redraw(self) -> None:
        """Fresh inputs: what is added to again and again would grow without an end."""
        for tensor in (self.hidden, self.attended, self.gated):
            tensor.normal_()

    def launch(self, name: str, layer: int, tuning: Tuning | None, *, pdl: bool = True) -> torch.Tensor:
        """Queues one product of a layer as `FewRowsLayers` does, and gives what it writes to."""
        weight = self.weights[name][layer % len(self.weights[name])]
        norm: dict[str, Any] = {"norm": self.norm, "epsilon": EPSILON, "normed": self.normed}
        launched: dict[str, Any] = {"pdl": pdl, "tuning": tuning}
        if name == "qkv" and self.shape.fuses_rope:
            keys, values = self.cache.unbind()
            return few_rows_qkv_triton(
                self.hidden, weight, self.rope, self.slots, keys, values, self.query, **norm, **launched
            )
        if name == "qkv":
            return few_rows_linear_triton(self.hidden, weight, self.qkv, **norm, **launched)
        if name == "output":
            return few_rows_linear_triton(self.attended, weight, self.hidden, residual=self.hidden, **launched)
        if name == "gate_up":
            activation = self.shape.activation
            return few_rows_linear_triton(self.hidden, weight, self.gated, activation=activation, **norm, **launched)
        if name == "down":
            return few_rows_linear_triton(self.gated, weight, self.hidden, residual=self.hidden, **launched)
        return few_rows_linear_triton(self.hidden, weight, self.logits, **norm, **launched)

    def expected(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What `launch` of layer 0 has to write, and the cache after it, by the definition. Changes nothing."""
        weight, cache = self.weights[name][0], self.cache.clone()
        norm: dict[str, Any] = {"norm": self.norm, "epsilon": EPSILON}
        if name == "qkv" and self.shape.fuses_rope:
            keys, values = cache.unbind()
            return few_rows_qkv_reference(self.hidden, weight, self.rope, self.slots, keys, values, **norm), cache
        if name in {"output", "down"}:
            x = self.attended if name == "output" else self.gated
            return few_rows_reference(x, weight, residual=self.hidden), cache
        activation = self.shape.activation if name == "gate_up" else None
        return few_rows_reference(self.hidden, weight, activation=activation, **norm), cache

    def run(self, tunings: Mapping[str, Tuning | None], *, pdl: bool = True) -> None:
        """Queues all layers and the head."""
        for layer in range(self.num_layers):
            for name in ("qkv", "output", "gate_up", "down"):
                self.launch(name, layer, tunings[name], pdl=pdl)
        self.launch("head", 0, tunings["head"], pdl=pdl)

    def _drawn(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        tensor = torch.empty(size, dtype=self.shape.dtype, device=self._device)
        return tensor if self._device.type == "cpu" else tensor.normal_(std=scale)


class GpuBench:
    """A `tuner.Bench`. Leave it as a context manager: it holds processes that compile."""

    def __init__(self, shape: ChainShape, device: torch.device) -> None:
        """Draws weights of some of the model's layers on the device. Raises torch.OutOfMemoryError when they do not fit."""
        self.shape = shape
        with torch.inference_mode():
            self._chain = Chain(shape, device, num_layers=num_chain_layers(shape))
        self._device = device
        self._rows = 0
        self._pool: CompilePool | None = None

    def __enter__(self) -> GpuBench:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    @property
    def num_layers(self) -> int:
        """Of the chain."""
        return self._chain.num_layers

    def compiled(self, choices: Mapping[int, Choices], until: float, report: Report) -> Mapping[int, Choices]:
        """See `tuner.Bench`. What is not compiled in time goes on in the background."""
        if self._pool is None:
            self._pool = CompilePool(self.shape)
        return self._pool.compiled(choices, until, report)

    def chain_seconds(self, rows: int, tunings: Mapping[str, Tuning]) -> float:
        """See `tuner.Bench`."""
        return self._seconds(rows, lambda: self._chain.run(tunings))

    def product_seconds(self, rows: int, name: str, tuning: Tuning) -> float:
        """See `tuner.Bench`."""

        def run() -> None:
            for layer in range(LONE_LAUNCHES):
                self._chain.launch(name, layer, tuning)

        return self._seconds(rows, run) / LONE_LAUNCHES

    @torch.inference_mode()
    def agrees(self, rows: int, name: str, tuning: Tuning) -> bool:
        """See `tuner.Bench`."""
        chain, tolerance = self._chain, _TOLERANCES[self.shape.dtype]
        for num_rows in _CHECKED_ROWS[rows]:
            self._resize(num_rows)
            chain.cache.normal_()
            wanted, cache = chain.expected(name)
            if name not in {"output", "down"}:  # which add to what is there
                for room in (chain.query, chain.qkv, chain.gated, chain.logits):
                    room.fill_(torch.nan)
            found = chain.launch(name, 0, tuning)
            pairs = ((found, wanted), (chain.cache, cache))
            if not all(_relative_error(ours, theirs) <= tolerance for ours, theirs in pairs):
                return False
        return True

    @torch.inference_mode()
    def _seconds(self, rows: int, run: Callable[[], None]) -> float:
        from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped]  # it comes without types

        self._resize(rows)
        try:
            run()
        except OutOfResources:  # more shared memory or registers than this GPU has; nothing was launched
            return math.inf
        return graph_seconds(run, self._device)

    def _resize(self, num_rows: int) -> None:
        if num_rows != self._rows:
            self._chain.resize(num_rows)
            self._rows = num_rows
        self._chain.redraw()


def num_chain_layers(shape: ChainShape) -> int:
    """How many layers are timed: CHAIN_BYTES of weights, at least two layers, and no more than the model has."""
    layer_bytes = sum(product.num_bytes for name, product in shape.products.items() if name != "head")
    return min(shape.num_layers, max(-(-CHAIN_BYTES // layer_bytes), 2))


def graph_seconds(run: Callable[[], None], device: torch.device, *, num_replays: int = NUM_REPLAYS) -> float:
    """Of what `run` queues, in a graph: the median of replays that stand queued one behind the other.

    `run` has run once before: what it launches is loaded, and allocates nothing that must outlive it.
    """
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_replays + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    milliseconds: list[float] = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
    return statistics.median(milliseconds) / 1000


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over norm; not a number when something is."""
    difference = torch.linalg.vector_norm(found.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float()))
