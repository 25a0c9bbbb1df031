"""The fused samplers on an NVIDIA GPU: eagerly and in a graph they choose the tokens that torch's operations choose there."""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable

import pytest
import torch

from hotgraph_server.kernels import sample_triton
from hotgraph_server.kernels.sample_triton import BlockResults, PlainSampling, sample_plain, sample_plain_triton
from tests.server.kernels import sample_checks

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
VOCABULARIES = (32000, 49152, 128256)
NUM_ROWS = (1, 8, 64)


def step_on_gpu(rng: random.Random, num_rows: int) -> PlainSampling:
    """With the ring where the host reads it."""
    step = sample_checks.draw_step(rng, num_rows, CUDA)
    return with_pinned_ring(step)


def with_pinned_ring(step: PlainSampling) -> PlainSampling:
    """The same tensors, but for the ring, which goes to pinned memory of the host."""
    tensors = dict(sample_checks.named(step))
    for name in ("ring_ids", "ring_values"):
        tensors[name] = tensors[name].cpu().pin_memory()
    return PlainSampling(**tensors)


def test_noise() -> None:
    """It is that of `noise.py` in torch's operations, over a million numbers."""
    for seed in range(4):
        sample_checks.check_noise(64, CUDA, seed=seed)


@pytest.mark.parametrize("is_greedy", [True, False], ids=["greedy", "gumbel"])
@pytest.mark.parametrize("dtype", sample_checks.DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("vocabulary_size", [*VOCABULARIES, 50257])
def test_sample_plain(vocabulary_size: int, num_rows: int, dtype: torch.dtype, is_greedy: bool) -> None:
    """Rows of all kinds, over and over: what torch writes is written, to the bit."""
    for seed in range(3):
        sample_checks.check_sample_plain(
            num_rows, vocabulary_size, dtype, CUDA, is_greedy=is_greedy, seed=seed, num_steps=4
        )


@pytest.mark.parametrize("vocabulary_size", VOCABULARIES)
def test_many_draws(vocabulary_size: int) -> None:
    """In 8192 draws from flat and from steep rows no token differs from torch's: scores are equal to the last place."""
    rng = random.Random(vocabulary_size)
    generator = torch.Generator(CUDA).manual_seed(vocabulary_size)
    found = step_on_gpu(rng, 64)
    found.temperature.fill_(0.8)
    expected = with_pinned_ring(sample_checks.copied(found))
    blocks = BlockResults.allocate(expected.values.shape[1], vocabulary_size, CUDA)
    for number in range(128):
        logits = torch.randn(64, vocabulary_size, generator=generator, device=CUDA) * (0.0, 0.5, 2.0, 6.0)[number % 4]
        for step in (expected, found):
            step.context_lens.fill_(number)
        sample_plain(logits, expected, is_greedy=False)
        sample_plain_triton(logits, found, blocks, is_greedy=False)
        torch.cuda.synchronize()
        sample_checks.assert_same(found, expected)


@pytest.mark.parametrize("is_greedy", [True, False], ids=["greedy", "gumbel"])
def test_in_a_graph(is_greedy: bool) -> None:
    """Captured for numbers of rows that never ran eagerly, and replayed with fresh logits, it gives what torch gives."""
    rng = random.Random(3)
    vocabulary_size = 32000
    found = step_on_gpu(rng, 16)
    expected = with_pinned_ring(sample_checks.copied(found))
    blocks = BlockResults.allocate(expected.values.shape[1], vocabulary_size, CUDA)
    logits = torch.zeros(16, vocabulary_size, device=CUDA)
    for run, step in ((sample_plain, expected), (functools.partial(sample_plain_triton, blocks=blocks), found)):
        run(logits[:2], step, is_greedy=is_greedy)
    graphs = {}
    for num_rows in (1, 7, 16):
        graphs[num_rows] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[num_rows]):
            sample_plain_triton(logits[:num_rows], found, blocks, is_greedy=is_greedy)
    for number in range(30):
        num_rows = (1, 7, 16)[number % 3]
        logits.copy_(sample_checks.draw_logits(rng, 16, vocabulary_size, torch.float32, CUDA))
        graphs[num_rows].replay()
        sample_plain(logits[:num_rows], expected, is_greedy=is_greedy)
        torch.cuda.synchronize()
        sample_checks.assert_same(found, expected)


def microseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Of one run among `repeats` in a graph, the median of 15 replays."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    times: list[float] = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / repeats)
    return statistics.median(times)


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints microseconds of a step's end in a graph, torch's and ours with 4 and 8 warps a block; ours is the faster."""
    print(f"\n{torch.cuda.get_device_name()}, microseconds: torch, Triton with 4 and with 8 warps")
    for is_greedy in (True, False):
        for vocabulary_size in VOCABULARIES:
            for num_rows in NUM_ROWS:
                step = step_on_gpu(random.Random(1), num_rows)
                step.temperature.fill_(0.8)
                blocks = BlockResults.allocate(step.values.shape[1], vocabulary_size, CUDA)
                logits = torch.randn(num_rows, vocabulary_size, device=CUDA)

                def plain(logits: torch.Tensor = logits, step: PlainSampling = step, g: bool = is_greedy) -> None:
                    sample_plain(logits, step, is_greedy=g)

                def fused(
                    logits: torch.Tensor = logits,
                    step: PlainSampling = step,
                    blocks: BlockResults = blocks,
                    g: bool = is_greedy,
                ) -> None:
                    sample_plain_triton(logits, step, blocks, is_greedy=g)

                times = [microseconds(plain)]
                for num_warps in (4, 8):
                    monkeypatch.setattr(sample_triton, "_BLOCK_WARPS", num_warps)
                    times.append(microseconds(fused))
                name = "greedy" if is_greedy else "gumbel"
                columns = "".join(f"{time:9.2f}" for time in times)
                print(f"  {name} V={vocabulary_size:<7} R={num_rows:<3}{columns}")
                assert min(times[1:]) < times[0]
