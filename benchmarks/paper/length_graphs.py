"""The paper's method: one CUDA graph for each exact length, over a transformers forward without KV cache.

Plain Python around it, and a rolling cache: the graph that was made first goes first. Without CUDA the forward is kept as it
is, so that everything around it can be run and tested; `is_captured` says which it was.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

WARM_UPS = 2  # forwards before a capture, which load kernels and libraries


@dataclass(slots=True)
class LengthGraph:
    """The forward over `ids` [1, length], whose logits [1, vocabulary] are those after token `last` [1]."""

    ids: torch.Tensor
    last: torch.Tensor
    logits: torch.Tensor
    replay: Callable[[], None]
    capture_seconds: float
    num_bytes: int


class LengthGraphs:
    """Graphs by length, at most `capacity` of them. All methods on one thread."""

    def __init__(self, model: PreTrainedModel, *, capacity: int) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._capacity = capacity
        self._graphs: OrderedDict[int, LengthGraph] = OrderedDict()
        self.is_captured = self._device.type == "cuda"
        self.num_created = 0
        self.num_evicted = 0
        self.capture_seconds: list[float] = []

    @property
    def lengths(self) -> list[int]:
        """Of the graphs that are there, the oldest first."""
        return list(self._graphs)

    @property
    def num_bytes(self) -> int:
        """What the graphs that are there took of the device's free memory when they were made."""
        return sum(graph.num_bytes for graph in self._graphs.values())

    def get(self, length: int) -> LengthGraph:
        """The graph of this length, captured now if there is none. Raises what a capture raises."""
        graph = self._graphs.get(length)
        if graph is None:
            while len(self._graphs) >= self._capacity:
                self._graphs.popitem(last=False)
                self.num_evicted += 1
            graph = self._graphs[length] = self._capture(length)
            self.num_created += 1
            self.capture_seconds.append(graph.capture_seconds)
        return graph

    def clear(self) -> None:
        """Drops every graph; none of them counts as evicted."""
        self._graphs.clear()

    @torch.inference_mode()
    def next_token(self, token_ids: Sequence[int], length: int | None = None) -> int:
        """The likeliest token after these, by the graph of `length` tokens (default: exactly theirs), padded on the right."""
        graph = self.get(length or len(token_ids))
        num_padding = graph.ids.shape[1] - len(token_ids)
        graph.ids.copy_(torch.tensor([[*token_ids, *[0] * num_padding]]))
        graph.last.fill_(len(token_ids) - 1)
        graph.replay()
        return int(graph.logits.argmax().item())

    @torch.inference_mode()
    def _capture(self, length: int) -> LengthGraph:
        free_before = self._free_bytes()
        begin_seconds = time.perf_counter()
        ids = torch.zeros(1, length, dtype=torch.int64, device=self._device)
        last = torch.full((1,), length - 1, dtype=torch.int64, device=self._device)
        if self._device.type != "cuda":
            logits = self._forward(ids, last)

            def run() -> None:
                logits.copy_(self._forward(ids, last))

            return LengthGraph(ids, last, logits, run, time.perf_counter() - begin_seconds, 0)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward(ids, last)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward(ids, last)
        torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - begin_seconds
        return LengthGraph(ids, last, logits, graph.replay, seconds, max(0, free_before - self._free_bytes()))

    def _forward(self, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = self._model.get_output_embeddings()  # type: ignore[no-untyped-call]
        logits: torch.Tensor = head(hidden[0].index_select(0, last))
        return logits

    def _free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0]) if self._device.type == "cuda" else 0
