"""Decoders in steps of few tokens on an NVIDIA GPU: fused kernels that overlap give what separate ones give one by one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import pytest
import torch
from cuda.bindings import runtime as cudart  # type: ignore[import-untyped]  # it ships no types
from transformers import LlamaConfig

from graphcache import NoTurns
from graphcache.backends.cuda import CudaBackend
from graphcache.backends.cuda_runtime import CudaRuntime
from hotgraph_server.kernels.attention_decode import decode_kernel
from hotgraph_server.kernels.attention_tiles import tile_kernel
from hotgraph_server.kernels.few_rows import has_pdl
from hotgraph_server.kernels.few_rows_dots import dots_kernel
from hotgraph_server.kernels.few_rows_norm import norm_kernel
from hotgraph_server.kernels.few_rows_sums import sums_kernel
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.few_rows_layers import MAX_TOKENS
from hotgraph_server.models.interface import Arena
from tests.gpu.decoders import CONFIGS, CUDA, TOLERANCES, arena_of, copied, decoder, relative_error
from tests.server.models.driver import Driver, random_model, random_tokens

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16)
NAMES = tuple("abcdefgh")
# Tokens of each row, of steps that the fused kernels take.
SHAPES: dict[str, dict[str, int]] = {
    **{f"{rows} decode rows": dict.fromkeys(NAMES[:rows], 1) for rows in (1, 2, 3, MAX_TOKENS)},
    **{f"{tokens} tokens of one row": {"a": tokens} for tokens in (2, 3, MAX_TOKENS)},
    "a decode row beside two of more": {"a": 1, "b": 3, "c": 2},
    "two rows of more": {"a": 2, "b": 5},
}


@pytest.fixture(autouse=True)
def is_able() -> None:
    """Other GPUs go through separate kernels."""
    if not has_pdl(CUDA):
        pytest.skip("this GPU has no programmatic dependent launch")


def filled(driver: Driver, vocabulary_size: int = 1024) -> None:
    """All rows have a past, one of them long enough that tables keep their width while the others grow."""
    for seed, name in enumerate(NAMES):
        driver.step({name: random_tokens(20 + 23 * seed, vocabulary_size, seed)})
    driver.step({"long": random_tokens(400, vocabulary_size, seed=99)})


def chunks_of(shape: str, seed: int, vocabulary_size: int = 1024) -> dict[str, list[int]]:
    return {
        name: random_tokens(count, vocabulary_size, seed=1000 * seed + index)
        for index, (name, count) in enumerate(SHAPES[shape].items())
    }


@functools.cache
def wide(*, fuses_few_rows: bool | None = None) -> Decoder:
    """Two layers with widths of a real model, at which every product has more tiles than are in flight."""
    config = LlamaConfig(
        vocab_size=4099,
        hidden_size=2048,
        intermediate_size=8704,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=1024,
        pad_token_id=None,
    )
    model = random_model(config)
    return Decoder.from_config(
        model.config, model.state_dict(), dtype=torch.float16, device=CUDA, fuses_few_rows=fuses_few_rows
    )


def assert_same(fused: Decoder, separate: Decoder, *, has_arena: bool, padding: int) -> None:
    """Logits of every shape, and the cache after all of them."""
    drivers = [
        Driver(
            model,
            num_padding_tokens=padding,
            num_padding_rows=padding,
            arena=arena_of(model, max_tokens=512, max_rows=10) if has_arena else None,
        )
        for model in (separate, fused)
    ]
    for driver in drivers:
        filled(driver)
    for seed, shape in enumerate(SHAPES):
        expected, found = (driver.step(chunks_of(shape, seed)) for driver in drivers)
        for name in SHAPES[shape]:
            assert relative_error(found[name], expected[name]) < TOLERANCES[fused.dtype], f"{name} in {shape}"
    for wanted, ours in zip(*((*driver.kv.keys, *driver.kv.values) for driver in drivers), strict=True):
        # Block 0 holds the padding's, which nobody reads.
        assert torch.equal(ours[1:].isnan(), wanted[1:].isnan())
        assert relative_error(ours[1:].float().nan_to_num(), wanted[1:].float().nan_to_num()) < TOLERANCES[fused.dtype]


@pytest.mark.parametrize("padding", [0, 1], ids=["whole", "padded"])
@pytest.mark.parametrize("has_arena", [False, True], ids=["without an arena", "with an arena"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_they_give_what_separate_kernels_give(name: str, dtype: torch.dtype, has_arena: bool, padding: int) -> None:
    """In every family logits, keys and values are the same within rounding."""
    fused, separate = (decoder(name, dtype, fuses_few_rows=fuses) for fuses in (None, False))
    assert_same(fused, separate, has_arena=has_arena, padding=padding)


def test_they_give_what_separate_kernels_give_at_real_widths() -> None:
    """The same where a product has many tiles and more programs than there are multiprocessors."""
    assert_same(wide(), wide(fuses_few_rows=False), has_arena=True, padding=0)


def num_variants() -> int:
    """Compiled kernels of the chain that there are in this process."""
    kernels = (sums_kernel, dots_kernel, norm_kernel, decode_kernel, tile_kernel)
    return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)


def test_a_few_steps_load_all_that_short_ones_need() -> None:
    """After the engine's first steps nothing is compiled for any other number of tokens or rows, in a capture or outside."""
    model = decoder("llama", torch.float16)
    driver = Driver(model, arena=arena_of(model, max_tokens=512, max_rows=16))
    filled(driver)
    for rows in (1, 2, 4, 8):
        driver.step({name: [5] for name in NAMES[:rows]})
    driver.step({"a": [5, 6, 7]})
    driver.step({"a": [5], "b": [6, 7, 8]})
    before = num_variants()
    for tokens in range(1, MAX_TOKENS + 1):
        driver.step({name: [5] for name in NAMES[:tokens]})
        for rows in range(1, tokens):
            driver.step({name: [5] * (tokens - rows + 1 if name == "a" else 1) for name in NAMES[:rows]})
    assert num_variants() == before > 0


def model_of(name: str) -> Decoder:
    return wide() if name == "wide" else decoder(name, torch.float16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*CONFIGS, "wide"])
def test_a_graph_replays_with_other_inputs(name: str, shape: str) -> None:
    """Replayed with other tokens, lengths and blocks, whatever is queued around it, it gives the eager logits to the bit."""
    model = model_of(name)
    arena, other_arena = (arena_of(model, max_tokens=512, max_rows=10) for _ in range(2))
    driver = Driver(model, arena=arena)
    filled(driver)
    buffers, _ = driver.tensors(chunks_of(shape, 0))
    with torch.inference_mode():
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            model.forward(buffers, driver.kv, arena)
        torch.cuda.synchronize()
        before = num_variants()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = model.forward(buffers, driver.kv, arena)
        assert num_variants() == before
        for seed in range(1, 9):
            step, names = driver.tensors(chunks_of(shape, seed))
            copied(step, buffers)
            expected = model.forward(step, driver.kv, other_arena)
            captured.fill_(torch.nan)
            # One right behind the other: the next one's first kernels may not begin before the last ones have ended.
            for _ in range(5):
                graph.replay()
            assert torch.equal(captured[: len(names)], expected[: len(names)])


class _Edges(CudaRuntime):
    """Notes of the last graph how many of its edges let the second kernel start before the first has ended."""

    num_programmatic = 0

    def edge_types(self, graph: int) -> tuple[int, ...]:
        types = super().edge_types(graph)
        programmatic = int(cudart.cudaGraphDependencyType.cudaGraphDependencyTypeProgrammatic)
        self.num_programmatic = types.count(programmatic)
        return types


@pytest.mark.parametrize("shape", SHAPES)
def test_the_capture_backend_keeps_the_overlap(shape: str) -> None:
    """Warmed up, captured and rehearsed as the engine does, on a stream and a thread of its own; all agree to the bit."""
    model = wide()
    arena = arena_of(model, max_tokens=512, max_rows=10)
    driver = Driver(model, arena=arena)
    filled(driver)
    buffers, names = driver.tensors(chunks_of(shape, 0))
    expected = model.forward(buffers, driver.kv, arena).clone()[: len(names)]
    room = torch.full_like(expected, torch.nan)
    torch.cuda.synchronize()

    runtime = _Edges()
    backend = CudaBackend(CUDA, runtime=runtime)

    def forward(give_way: Callable[[float], None] | None) -> None:
        with torch.inference_mode():
            room.copy_(model.forward(buffers, driver.kv, arena, give_way)[: len(names)])

    def check_room() -> None:
        torch.cuda.synchronize()
        assert torch.equal(room, expected)
        room.fill_(torch.nan)
        torch.cuda.synchronize()

    def run() -> None:
        backend.start(NoTurns())
        try:
            backend.warm_up(lambda: forward(backend.give_way))
            check_room()
            graph = backend.capture(shape, lambda: forward(None))
            # At least the three products behind each attention, and the head.
            assert runtime.num_programmatic >= 3 * len(model.kv_layout) + 1
            for _ in range(20):
                graph.replay()
            check_room()
            backend.rehearse(lambda: forward(backend.give_way))
            check_room()
            again = backend.capture(shape, lambda: forward(None))
            graph.destroy()
            torch.cuda.synchronize()
            again.replay()
            check_room()
            taken_over = backend.capture(shape, lambda: forward(None))
            assert taken_over.is_update
            taken_over.replay()
            check_room()
            again.destroy()
            taken_over.destroy()
        finally:
            backend.close()

    failures: list[BaseException] = []

    def run_and_note() -> None:
        try:
            run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run_and_note, name="capture")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def microseconds(model: Decoder, arena: Arena, rows: int) -> float:
    """Of a decode step in a graph, without the host: the median of replays."""
    driver = Driver(model, arena=arena)
    filled(driver)
    buffers, _ = driver.tensors({name: [5] for name in NAMES[:rows]})
    model.forward(buffers, driver.kv, arena)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.forward(buffers, driver.kv, arena)
    times: list[float] = []
    for _ in range(30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return sorted(times)[len(times) // 2]


def test_times() -> None:
    """Prints microseconds of decode steps of two wide layers, fused and separate; one row is faster fused."""
    models = {"fused": wide(), "separate": wide(fuses_few_rows=False)}
    times = {
        name: [microseconds(model, arena_of(model, 512, 10), rows) for rows in (1, 2, 4, 8)]
        for name, model in models.items()
    }
    print(f"\n{torch.cuda.get_device_name()}, microseconds of two layers and a head at 1, 2, 4, 8 decode rows")
    for name, found in times.items():
        print(f"  {name:<10}" + "".join(f"{time:9.1f}" for time in found))
    assert times["fused"][0] < times["separate"][0]
