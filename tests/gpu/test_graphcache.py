"""The library by itself on a GPU, without anything of the server: it captures, replays, refuses, evicts and takes back."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import monotonic

import pytest
import torch

from graphcache import CacheSettings, GraphCache, GraphState
from graphcache.backends.cuda import CudaBackend
from graphcache.example import Served

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

CUDA = torch.device("cuda:0")
WIDTH = 256
WAIT_SECONDS = 60.0


def module(seed: int = 3) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH)]
    return torch.nn.Sequential(*layers, torch.nn.LayerNorm(WIDTH)).to(CUDA).eval()


class Program:
    """`outputs[:n] = module(inputs[:n])` for key n. Keys in `broken` do what no capture may; those in `lies` something else."""

    def __init__(self, backend: CudaBackend, max_rows: int = 64) -> None:
        self.backend = backend
        self.inputs = torch.randn(max_rows, WIDTH, device=CUDA)
        self.outputs = torch.zeros_like(self.inputs)
        self.module = module()
        self.broken: dict[int, Callable[[], object]] = {}
        self.lies: set[int] = set()
        self.turn = threading.Lock()  # graphs of one backend are replayed one after the other
        torch.cuda.synchronize()

    def work(self, rows: int) -> None:
        self.outputs[:rows] = self.module(self.inputs[:rows])

    def bind(self, rows: int) -> Callable[[], None]:
        self.backend.warm_up(lambda: self.module(torch.ones_like(self.inputs[:rows])))

        def work() -> None:
            self.work(rows)
            if rows in self.broken:
                self.broken[rows]()
            if rows in self.lies:
                self.outputs.mul_(1.01)

        return work

    def verify(self, rows: int, replay: Callable[[], None]) -> bool:
        with self.turn, torch.inference_mode():
            kept = self.inputs.clone()
            self.inputs.normal_()
            expected = self.module(self.inputs[:rows])
            replay()
            is_equal = torch.allclose(self.outputs[:rows], expected, rtol=1e-3, atol=1e-4)
            self.inputs.copy_(kept)
            torch.cuda.current_stream().synchronize()
            return is_equal


@contextmanager
def started(program: Program, settings: CacheSettings | None = None) -> Iterator[GraphCache[int]]:
    cache = GraphCache[int](program, program.backend, settings)
    cache.start()
    try:
        yield cache
    finally:
        cache.close()


def states(cache: GraphCache[int], *keys: int) -> list[GraphState]:
    for key in keys:
        cache.request(key)
    return [info.state for info in cache.wait(keys, WAIT_SECONDS)]


def replayed(cache: GraphCache[int], program: Program, rows: int) -> torch.Tensor:
    """What the graph gives for the inputs as they are, on this thread's stream."""
    graph = cache.acquire(rows)
    assert graph is not None
    try:
        program.outputs.zero_()
        graph.replay()
        return program.outputs[:rows].clone()
    finally:
        torch.cuda.current_stream().synchronize()
        graph.release()


def test_the_readmes_example() -> None:
    """An ordinary module behind the cache gives its own results for every input, first eagerly and then from graphs."""
    served = Served(module(), torch.zeros(8, WIDTH, device=CUDA), CudaBackend(CUDA))
    served.cache.start()
    try:
        for repeat in range(3):
            for rows in range(1, 9):
                x = torch.randn(rows, WIDTH, device=CUDA)
                expected = served.module(x).detach().cpu()
                torch.testing.assert_close(served(x), expected, rtol=1e-4, atol=1e-4)
            if repeat == 0:
                infos = served.cache.wait(range(1, 9), WAIT_SECONDS)
                assert {info.state for info in infos} == {GraphState.READY}
        stats = served.cache.stats()
        assert (stats.num_hits, stats.num_misses, stats.num_failures) == (16, 8, 0)
    finally:
        served.cache.close()


def test_replays_while_others_are_captured() -> None:
    """A thread that replays one graph all the time gets its bits every time, while sixty others or more come and go."""
    program = Program(CudaBackend(CUDA))
    with started(program) as cache, torch.inference_mode():
        assert states(cache, 5) == [GraphState.READY]
        inputs = torch.randn(5, WIDTH, device=CUDA)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's gap
        own_in, own_out = program.inputs, program.outputs
        # What is captured from now on has buffers of its own, as the verification writes them.
        program.inputs, program.outputs = torch.randn_like(own_in), torch.zeros_like(own_out)
        torch.cuda.synchronize()
        stop, wrong, num_replays = threading.Event(), [], 0

        def serve() -> None:
            nonlocal num_replays
            with torch.inference_mode(), torch.cuda.stream(stream):
                expected: torch.Tensor | None = None
                while not stop.is_set():
                    graph = cache.acquire(5)
                    assert graph is not None
                    with program.turn:
                        own_in[:5].copy_(inputs)
                        graph.replay()
                        found = own_out[:5].clone()
                        stream.synchronize()
                    graph.release()
                    num_replays += 1
                    if expected is None:
                        expected = found
                        torch.testing.assert_close(found, program.module(inputs), rtol=1e-4, atol=1e-4)
                    if not torch.equal(found, expected):
                        wrong.append(num_replays)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            num_rounds = 0
            while num_rounds < 3 or (num_replays <= 100 and num_rounds < 30):  # a busy host replays few in a round
                assert set(states(cache, *range(10, 30))) == {GraphState.READY}
                for rows in range(10, 30):
                    cache.evict(str(rows))
                num_rounds += 1
        finally:
            stop.set()
            thread.join()
        assert not wrong
        assert num_replays > 100
        assert program.backend.stats().num_updates > 0  # executables of evicted graphs serve again


def test_what_breaks_a_capture_fails_alone() -> None:
    """Work that waits, wants too much memory or raises gives a failed key with a reason, and everything else goes on."""
    backend = CudaBackend(CUDA)
    program = Program(backend)
    program.broken = {
        1: lambda: torch.ones(1, device=CUDA).item(),
        2: lambda: torch.empty(1 << 45, dtype=torch.uint8, device=CUDA),
        3: lambda: 1 // 0,
        4: torch.cuda.synchronize,
    }
    with started(program) as cache:
        for rows in program.broken:
            assert states(cache, rows) == [GraphState.FAILED], rows
            assert states(cache, 10 + rows) == [GraphState.READY], rows
        failures = {info.name: info.failure for info in cache.list([GraphState.FAILED])}
        assert "memory" in failures["2"]
        assert "ZeroDivisionError" in failures["3"]
        torch.testing.assert_close(
            replayed(cache, program, 11), program.module(program.inputs[:11]).detach(), rtol=1e-4, atol=1e-4
        )
        assert backend.stats().num_failures == len(program.broken)
        torch.cuda.synchronize()  # the process is as it was


def test_what_lies_is_quarantined() -> None:
    """A graph whose replay differs from the eager run is never published, not even when it is asked for again."""
    program = Program(CudaBackend(CUDA))
    program.lies = {7}
    with started(program) as cache:
        assert states(cache, 7, 8) == [GraphState.QUARANTINED, GraphState.READY]
        assert cache.lookup(7) is None
        assert states(cache, 7) == [GraphState.QUARANTINED]


def test_the_budget_holds() -> None:
    """Under a budget of a few graphs ready ones never exceed it, and what was evicted is captured again when wanted."""
    backend = CudaBackend(CUDA)
    program = Program(backend)
    with started(program, CacheSettings(policy="lru")) as cache:
        assert set(states(cache, *range(2, 20))) == {GraphState.READY}
        # The first graph of all grew the pool, and counts for many.
        sizes = sorted(info.size_bytes for info in cache.list([GraphState.READY]))
        assert sizes[0] > 0
        assert cache.update_budget(limit_bytes=6 * sizes[len(sizes) // 2])
        for seed in range(3):
            for rows in range(2, 20):
                cache.request(rows)
                cache.wait([rows], WAIT_SECONDS)
                budget = cache.budget()
                assert budget.used_bytes <= budget.limit_bytes, (seed, rows)
        stats = cache.stats()
        assert stats.num_evictions > 18
        assert 1 <= stats.num_ready < 18


def test_memory_comes_back() -> None:
    """Caches that are opened, filled and closed one after the other leave no more and more memory behind."""
    free = []
    for _ in range(5):
        program = Program(CudaBackend(CUDA))
        with started(program) as cache:
            assert set(states(cache, *range(1, 33))) == {GraphState.READY}
        del program, cache
        gc.collect()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info(CUDA)[0])
    print("free MiB after each:", [value >> 20 for value in free])
    assert free[1] - free[-1] <= 16 << 20


def test_a_lookup_is_cheap() -> None:
    """A miss waits for nothing, also while captures are under way: it takes microseconds, but for a switch of threads."""
    program = Program(CudaBackend(CUDA))
    with started(program) as cache:
        seconds = []
        for rows in range(1, 60):
            started_at = monotonic()
            assert cache.acquire(1000 + rows) is None
            cache.record_miss(rows, 0.001)
            seconds.append(monotonic() - started_at)
        cache.wait(range(1, 60), WAIT_SECONDS)
        print(f"a miss: {1e6 * median(seconds):.0f} us, the longest {1e6 * max(seconds):.0f}")
        assert median(seconds) < 1e-4
        assert max(seconds) < 0.02
