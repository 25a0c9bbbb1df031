"""Times of attention for decode rows on a GPU: what is taken, and what else could be; alone, in a chain, and with a long row.

`python -m tests.gpu.attention_times OUT.json` on a GPU. Caches of several layers are read in turn, so that none is found in the
L2 cache; all times are of graphs, without the host.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hotgraph_server.kernels.attention_cuts import LONG_SHARE
from hotgraph_server.kernels.attention_rows import DeviceRows
from hotgraph_server.kernels.attention_triton import Launch, launches
from hotgraph_server.kernels.few_rows_triton import few_rows_linear_triton, few_rows_qkv_triton
from hotgraph_server.kernels.rope import RopePlan

HEADS = ((32, 32), (32, 8))
HEAD_DIM, BLOCK_SIZE, HIDDEN = 128, 16, 4096
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (256, 1024, 4096)
CHAIN_LAYERS = 4
LONG_CONTEXT = 16384
_CACHE_BYTES = 150_000_000  # more than twice what the L2 of an H100 or H200 holds
_MAX_LAYERS = 48


@dataclass(frozen=True)
class Candidate:
    """How decode is cut up. rounds: loads of 16 bytes of a thread that a lane's keys take; the rest: see `Splits` and `Cut`.

    splits: a row's that have programs of their own.
    """

    splits: int
    tile_keys: int
    num_warps: int
    rounds: int = 1
    is_ahead: bool = True
    least_share: int = 16
    max_splits: int = 0
    num_extra: int = 0
    max_registers: int | None = None

    @property
    def num_parts(self) -> int:
        """Splits that a row has at most."""
        return max(self.splits, self.max_splits, 2)


class Step:
    """Rows of one token with caches of several layers."""

    def __init__(
        self,
        lengths: Sequence[int],
        heads: tuple[int, int],
        device: str = "cuda",
        *,
        num_layers: int | None = None,
        max_context: int | None = None,
    ) -> None:
        """max_context: what tables have room for; the longest row if not told."""
        num_heads, num_kv_heads = heads
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        self.num_bytes = 2 * sum(lengths) * num_kv_heads * HEAD_DIM * 2
        num_layers = num_layers or min(max(2, -(-_CACHE_BYTES // self.num_bytes)), _MAX_LAYERS)
        shape = (num_layers, sum(counts) + 1, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
        self.caches = [torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2)]
        self.query = torch.empty(len(lengths), num_heads, HEAD_DIM, dtype=torch.float16, device=device)
        for tensor in (*self.caches, self.query):
            if device != "cpu":  # there it is only compiled for
                tensor.normal_()
        self.out = torch.empty_like(self.query)
        order = torch.randperm(sum(counts), dtype=torch.int32) + 1
        tables = torch.zeros(len(lengths), -(-(max_context or max(lengths)) // BLOCK_SIZE), dtype=torch.int32)
        for table, blocks in zip(tables, torch.split(order, counts), strict=True):
            table[: len(blocks)] = blocks
        last = torch.tensor([length - 1 for length in lengths])
        places = tables[torch.arange(len(lengths)), last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
        self.kv_indices = places.long().to(device)
        self.positions = last.to(device)
        self.rows = DeviceRows(
            block_tables=tables.to(device),
            context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_starts=torch.arange(len(lengths) + 1, dtype=torch.int32, device=device),
            num_tokens=len(lengths),
            block_size=BLOCK_SIZE,
        )

    @property
    def num_layers(self) -> int:
        """There are."""
        return len(self.caches[0])

    def launch(self, layer: int, candidate: Candidate | None, *, pdl: bool) -> Launch:
        """Of a layer's attention; as it is taken without a candidate."""
        keys, values = (cache[layer] for cache in self.caches)
        (launch,) = launches(
            self.query,
            keys,
            values,
            self.rows,
            self.out,
            scaling=HEAD_DIM**-0.5,
            window=None,
            softcap=None,
            sinks=None,
            pdl=pdl,
        )
        if candidate is None:
            return launch
        heads = launch.arguments["block_heads"]
        lanes = candidate.rounds * candidate.num_warps * 32 * 16 // (2 * HEAD_DIM)
        words = 2 if candidate.is_ahead else 1
        arguments = launch.arguments | {
            "keys": keys.view(torch.int32) if words == 2 else keys,
            "values": values.view(torch.int32) if words == 2 else values,
            "words": words,
            "IS_AHEAD": candidate.is_ahead,
            "tile_keys": candidate.tile_keys,
            "num_warps": candidate.num_warps,
            "lanes": min(candidate.tile_keys, lanes),
            "least_share": candidate.least_share,
            "most_share": LONG_SHARE if candidate.num_extra else 1 << 30,
            "even_bits": candidate.splits.bit_length() - 1,
            "split_bits": candidate.num_parts.bit_length() - 1,
            "maxnreg": candidate.max_registers,
            "heads_at_once": max(
                1, min(2 ** math.ceil(math.log2(heads)), candidate.num_warps * 2048 // (16 * HEAD_DIM))
            ),
            **self._room(candidate.num_parts),
        }
        return Launch(launch.kernel, (*launch.grid[:2], candidate.splits + candidate.num_extra), arguments)

    def current(self) -> Candidate:
        """What is taken without being told."""
        launch = self.launch(0, None, pdl=False)
        found = launch.arguments
        loads = found["lanes"] * 2 * HEAD_DIM // (found["num_warps"] * 32 * 16)
        splits = 1 << found["even_bits"]
        return Candidate(
            splits,
            found["tile_keys"],
            found["num_warps"],
            max(1, loads) if found["padded_heads"] == 1 else 1,
            found["IS_AHEAD"],
            found["least_share"],
            1 << found["split_bits"],
            launch.grid[2] - splits,
            found["maxnreg"],
        )

    def run(self, layer: int, candidate: Candidate, *, pdl: bool) -> None:
        """Launches it."""
        launch = self.launch(layer, candidate, pdl=pdl)
        launch.kernel[launch.grid](**launch.arguments)

    def _room(self, splits: int) -> dict[str, torch.Tensor]:
        scratch = self.rows.scratch(self.query.shape[1], splits, HEAD_DIM)
        return {name: getattr(scratch, name) for name in ("sums", "maxima", "totals", "arrivals")}

    def microseconds(self, candidate: Candidate) -> float:
        """Of a layer, one behind the other with PDL."""
        works = [functools.partial(self.run, layer, candidate, pdl=True) for layer in range(self.num_layers)]
        return graph_microseconds(works) / len(works)


class Chain:
    """Attention between the products that stand around it in a short step: of one head a KV head, as the kernels overlap."""

    def __init__(self) -> None:
        def weight(rows: int) -> torch.Tensor:
            return torch.randn(rows, HIDDEN, dtype=torch.float16, device="cuda").mul_(HIDDEN**-0.5)

        self._weights = [(weight(3 * HIDDEN), weight(HIDDEN)) for _ in range(CHAIN_LAYERS)]
        self._norm = torch.ones(HIDDEN, dtype=torch.float16, device="cuda")
        self._table = torch.ones(max(CONTEXTS) + 1, HEAD_DIM, device="cuda")

    def microseconds(self, step: Step, candidate: Candidate | None) -> float:
        """Of a layer's products with attention between them; without a candidate of the products alone."""
        hidden = torch.randn(len(step.query), HIDDEN, dtype=torch.float16, device="cuda")
        normed = torch.empty_like(hidden)
        rope = RopePlan(self._table, step.positions, None)

        def layer(index: int) -> None:
            qkv, output = self._weights[index]
            few_rows_qkv_triton(
                hidden,
                qkv,
                rope,
                step.kv_indices,
                step.caches[0][index],
                step.caches[1][index],
                step.query,
                norm=self._norm,
                epsilon=1e-5,
                normed=normed,
                pdl=True,
            )
            if candidate is not None:
                step.run(index, candidate, pdl=True)
            few_rows_linear_triton(step.out.flatten(1), output, hidden, residual=hidden, pdl=True)

        return graph_microseconds([functools.partial(layer, index) for index in range(CHAIN_LAYERS)]) / CHAIN_LAYERS


def graph_microseconds(works: Sequence[Callable[[], object]], *, num_replays: int = 7) -> float:
    """Of all works together, one after the other in one graph: the median of replays."""
    for work in works[:2]:
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


def candidates(current: Candidate, *, is_grouped: bool) -> Iterator[Candidate]:
    """The current one, and others: fewer splits and more, smaller tiles and larger, shorter shares and longer."""
    yield current
    cuts = [(16, 2, 2, True), (32, 2, 2, True), (32, 4, 1, True)]
    if is_grouped:
        cuts = [(32, 4, 1, True), (64, 4, 1, False), (16, 4, 1, True)]
    for splits in sorted({max(1, current.splits // 2), current.splits, min(32, current.splits * 2)}):
        for cut in cuts if splits == current.splits else cuts[:2]:
            is_small = cut == (16, 2, 2, True)
            yield Candidate(splits, *cut, least_share=current.least_share, max_registers=128 if is_small else None)
    if current.num_extra:
        yield replace(current, num_extra=0, max_splits=0)
    yield replace(current, least_share=16)
    yield replace(current, least_share=2 * current.least_share)


def _compile(variant: tuple[tuple[int, int], Candidate]) -> None:
    """In a process without a GPU: leaves the kernel in Triton's cache on disk."""
    import pytest

    from tests.server.kernels.compiler import compile_launches

    heads, candidate = variant
    with pytest.MonkeyPatch.context() as patch:
        compile_launches(patch)
        step = Step([16], heads, "cpu", num_layers=1)
        step.run(0, candidate, pdl=True)


def compile_all(variants: Sequence[tuple[tuple[int, int], Candidate]]) -> None:
    """On all cores."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), mp_context=context) as executor:
        list(executor.map(_compile, variants))


def plan() -> dict[tuple[tuple[int, int], int, int], list[Candidate]]:
    """What is timed, by heads, rows and context."""
    found = {}
    for heads in HEADS:
        for rows in ROW_COUNTS:
            for context in CONTEXTS:
                # The launch follows from the table's width and the number of rows, not from a length or a layer.
                step = Step([BLOCK_SIZE] * rows, heads, "cpu", num_layers=1, max_context=context)
                tries = candidates(step.current(), is_grouped=heads[0] != heads[1])
                found[heads, rows, context] = list(dict.fromkeys(tries))
    return found


def long_rows() -> Iterator[tuple[int, list[int]]]:
    """All rows short, one of them long, the first or the last, and half of them long."""
    for rows in (4, 8, 64):
        yield rows, [256] * rows
        yield rows, [LONG_CONTEXT] + [256] * (rows - 1)
        yield rows, [256] * (rows - 1) + [LONG_CONTEXT]
        yield rows, [4096] * (rows // 2) + [256] * (rows - rows // 2)


def main(path: Path) -> None:
    """Writes all times, in microseconds, and prints a table."""
    planned = plan()
    compiled = {
        (heads, replace(candidate, splits=2, least_share=16, max_splits=0, num_extra=0))
        for (heads, _, _), tries in planned.items()
        for candidate in tries
    }
    compile_all(sorted(compiled, key=str))
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "alone": [], "chain": [], "long": []}
    chain = Chain()
    for (heads, rows, context), tries in planned.items():
        step = Step([context] * rows, heads)
        found = _timed(tries, step.microseconds)
        result["alone"].append({"heads": heads, "rows": rows, "context": context, "found": found})
        _print(f"{heads[0]}/{heads[1]} heads {rows:2} rows {context:4} keys", found, step.num_bytes)
        if heads[0] == heads[1] and rows <= 8 and context <= 1024:
            del step
            step = Step([context] * rows, heads, num_layers=CHAIN_LAYERS)
            without = chain.microseconds(step, None)
            found = _timed(tries, functools.partial(chain.microseconds, step))
            found = [entry | {"us": entry["us"] - without} for entry in found]
            result["chain"].append({"rows": rows, "context": context, "products_us": without, "found": found})
            _print(f"  in a chain with products of {without:.1f} us", found, step.num_bytes)
        del step
    for rows, lengths in long_rows():
        for heads in HEADS:
            step = Step(lengths, heads, max_context=LONG_CONTEXT)
            current = step.current()
            # Beside it: without programs for long rows, and a grid that has one for every share there can be.
            plain = [replace(current, splits=splits, max_splits=0, num_extra=0) for splits in (current.splits, 16)]
            found = _timed([current, *plain], step.microseconds)
            result["long"].append({"heads": heads, "lengths": lengths, "current": asdict(current), "found": found})
            name = f"{heads[0]}/{heads[1]} heads {rows:2} rows, {lengths[0]} to {lengths[-1]} keys"
            _print(f"{name}, takes {current.splits} splits and {current.num_extra}", found, step.num_bytes)
            del step
    path.write_text(json.dumps(result, indent=1))


def _timed(tries: Sequence[Candidate], measure: Callable[[Candidate], float]) -> list[dict[str, Any]]:
    """The first is the current one."""
    return [{"us": measure(candidate), **asdict(candidate)} for candidate in tries]


def _print(name: str, found: Sequence[dict[str, Any]], num_bytes: int) -> None:
    best = min(found, key=lambda entry: float(entry["us"]))
    print(
        f"{name}: current {found[0]['us']:7.2f} us ({num_bytes / found[0]['us'] / 1e6:.2f} TB/s), best {best['us']:7.2f} "
        f"splits {best['splits']} tile {best['tile_keys']} warps {best['num_warps']} rounds {best['rounds']} "
        f"{'ahead' if best['is_ahead'] else 'through shared memory'}",
        flush=True,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
