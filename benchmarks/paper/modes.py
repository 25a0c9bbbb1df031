"""The ways to serve that are compared, behind one interface: a first token, and token after token.

Every mode has the same weights where they are ours to choose, the same prompts and the same clock. What cannot run here
raises NotRunError with its reason, and stands in the tables as "not run".
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from benchmarks.gpu.models import TIE_TOLERANCES
from benchmarks.gpu.service import EAGER, Service, failures, make_settings, serving
from benchmarks.paper.bench import Bench
from benchmarks.paper.length_graphs import LengthGraphs
from benchmarks.paper.outside import OutsideEngine, open_tensorrt_llm, open_vllm
from hotgraph_server.request import GraphPolicy


class NotRunError(Exception):
    """This mode cannot do what is asked here; the text says why."""


class Mode(Protocol):
    """One way to serve a lone request, greedy. Not shared between tasks."""

    async def prepare(self, lengths: Sequence[int]) -> None:
        """Makes everything that prompts of these lengths can use, so that they find it warm."""
        ...

    async def first_token(self, prompt: Sequence[int]) -> int:
        """The token after the prompt, on the host."""
        ...

    async def generate(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """Tokens, and when each was on the host, in perf_counter seconds. Raises NotRunError."""
        ...


class TransformersEager:
    """transformers' own forward, launched operation by operation, with its own growing KV cache when it decodes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._device = next(model.parameters()).device

    async def prepare(self, lengths: Sequence[int]) -> None:
        for length in lengths[:2]:
            await self.first_token([1] * length)

    async def first_token(self, prompt: Sequence[int]) -> int:
        return int(self._logits(prompt).argmax().item())

    async def generate(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        return self._generate(prompt, num_tokens)

    @torch.inference_mode()  # of a plain function: around an async one it would end before the work begins
    def _generate(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        cache = DynamicCache(config=self._model.config)
        ids = torch.tensor([list(prompt)], device=self._device)
        tokens: list[int] = []
        times: list[float] = []
        for _ in range(num_tokens):
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
            tokens.append(int(ids.item()))
            times.append(time.perf_counter())
        return tokens, times

    def is_likeliest(self, prompt: Sequence[int], token_id: int) -> bool:
        """Whether no other token is likelier after the prompt by more than the rounding of two implementations."""
        logits = self._logits(prompt).float().reshape(-1)
        return bool(logits.max() - logits[token_id] <= 2 * TIE_TOLERANCES[self._model.dtype])

    @torch.inference_mode()
    def _logits(self, prompt: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([list(prompt)], device=self._device)
        logits: torch.Tensor = self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits


class GraphsOnly:
    """The paper's rolling cache of graphs by length."""

    def __init__(self, graphs: LengthGraphs) -> None:
        self.graphs = graphs

    async def prepare(self, lengths: Sequence[int]) -> None:
        for length in lengths:
            self.graphs.get(length)

    async def first_token(self, prompt: Sequence[int]) -> int:
        return self.graphs.next_token(prompt)

    async def generate(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        text = list(prompt)
        times: list[float] = []
        for _ in range(num_tokens):
            text.append(self.graphs.next_token(text))
            times.append(time.perf_counter())
        return text[len(prompt) :], times


class Hotgraph:
    """Our engine and scheduler in this process. `policy` EAGER: our kernels without graphs."""

    def __init__(self, service: Service, policy: GraphPolicy | None) -> None:
        self.service = service
        self._policy = policy

    async def prepare(self, lengths: Sequence[int]) -> None:
        if self._policy is None:
            keys = [self.service.decode_key(1), *map(self.service.prompt_key, lengths)]
            if failed := failures(await self.service.warm(keys)):
                raise RuntimeError(f"graphs were not captured: {failed}")
        await self.service.settle()  # what the engine captures by itself
        for length in lengths[:2]:
            await self.generate([1] * length, 2)

    async def first_token(self, prompt: Sequence[int]) -> int:
        return (await self.generate(prompt, 1))[0][0]

    async def generate(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        completion = await self.service.complete(self.service.request(prompt, num_tokens, policy=self._policy))
        if self._policy is None and not completion.is_all_graphs:
            raise RuntimeError(f"a prompt of {len(prompt)} tokens ran eagerly where its graph was to be measured")
        return completion.token_ids, completion.token_seconds


class Outside:
    """Another engine, by its adapter."""

    def __init__(self, engine: OutsideEngine) -> None:
        self._engine = engine

    async def prepare(self, lengths: Sequence[int]) -> None:
        for length in lengths:
            self._engine.generate([1] * length, 1)

    async def first_token(self, prompt: Sequence[int]) -> int:
        return self._engine.generate(prompt, 1)[0]

    async def generate(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        raise NotRunError("its offline interface does not tell when each token came")


@contextlib.asynccontextmanager
async def transformers_eager(bench: Bench) -> AsyncIterator[Mode]:
    yield TransformersEager(bench.transformers())


@contextlib.asynccontextmanager
async def graphs_only(bench: Bench) -> AsyncIterator[Mode]:
    graphs = LengthGraphs(bench.transformers(), capacity=bench.arguments.capacity)
    try:
        yield GraphsOnly(graphs)
    finally:
        graphs.clear()
        bench.free()


@contextlib.asynccontextmanager
async def jit_only(bench: Bench) -> AsyncIterator[Mode]:
    async with serving_lone(bench) as service:
        yield Hotgraph(service, EAGER)


@contextlib.asynccontextmanager
async def hotgraph(bench: Bench) -> AsyncIterator[Mode]:
    async with serving_lone(bench) as service:
        yield Hotgraph(service, None)


@contextlib.asynccontextmanager
async def serving_lone(bench: Bench, *, run_ahead: int | None = None) -> AsyncIterator[Service]:
    """Our engine with room for lone requests as long as the tables ask for."""
    settings = make_settings(bench.loaded(), num_slots=8, kv_tokens=4096)
    async with serving(
        bench.loaded(), settings, run_ahead=bench.run_ahead if run_ahead is None else run_ahead
    ) as service:
        yield service


def _outside(
    name: str, open_engine: Callable[[str, str], OutsideEngine]
) -> Callable[[Bench], AbstractAsyncContextManager[Mode]]:
    @contextlib.asynccontextmanager
    async def mode(bench: Bench) -> AsyncIterator[Mode]:
        if bench.device.type != "cuda":
            raise NotRunError(f"{name} is compared on CUDA only")
        bench.drop_models()  # it takes its memory for itself
        try:
            engine = open_engine(bench.arguments.config, bench.dtype_name)
        except ImportError as error:
            raise NotRunError(f"{name} is not installed") from error
        try:
            yield Outside(engine)
        finally:
            engine.close()

    return mode


MODES: dict[str, Callable[[Bench], AbstractAsyncContextManager[Mode]]] = {
    "transformers eager": transformers_eager,
    "CUDA graphs only": graphs_only,
    "JIT only": jit_only,
    "hotgraph": hotgraph,
    "vLLM": _outside("vLLM", open_vllm),
    "TensorRT-LLM": _outside("TensorRT-LLM", open_tensorrt_llm),
}
"""In the order in which they run. The outside engines come last: our models are dropped for them."""
