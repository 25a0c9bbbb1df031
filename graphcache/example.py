"""An ordinary torch module behind a cache of graphs, one for each number of rows."""

from collections.abc import Callable
from threading import Lock
from time import perf_counter

import torch

from graphcache import Backend, GraphCache


class Served:
    def __init__(self, module: torch.nn.Module, inputs: torch.Tensor, backend: Backend) -> None:
        self.module, self.inputs, self.outputs = module, inputs, module(inputs).detach()  # static: they never move
        self.backend, self.turn, self.cache = backend, Lock(), GraphCache[int](self, backend)

    def run(self, rows: int) -> None:
        self.outputs[:rows] = self.module(self.inputs[:rows])

    def bind(self, rows: int) -> Callable[[], None]:  # on the capture thread
        self.backend.warm_up(lambda: self.module(torch.ones_like(self.inputs[:rows])))  # loads the kernels
        return lambda: self.run(rows)

    def verify(self, rows: int, replay: Callable[[], None]) -> bool:  # there, too: between two calls
        with self.turn, torch.inference_mode():
            expected = self.module(self.inputs[:rows].normal_())
            replay()
            return torch.allclose(self.outputs[:rows], expected, rtol=1e-3, atol=1e-3)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # at most as many rows as the inputs have
        with self.turn, torch.inference_mode():
            started, rows = perf_counter(), len(x)
            self.inputs[:rows] = x
            graph = self.cache.acquire(rows)  # a dictionary read: no call waits for a capture
            self.run(rows) if graph is None else graph.replay()
            result: torch.Tensor = self.outputs[:rows].cpu()  # waits for the device: then the replay is over
            if graph is None:
                self.cache.record_miss(rows, perf_counter() - started)  # has it captured meanwhile
            else:
                graph.release()
                self.cache.record_hit(graph, perf_counter() - started)
            return result
