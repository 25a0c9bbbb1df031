"""Attention on an NVIDIA GPU, eagerly and in graphs: what the definition gives, whatever the lengths."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hotgraph_server.kernels.attention import AttentionPlan, paged_attention
from hotgraph_server.kernels.attention_decode import decode_kernel
from hotgraph_server.kernels.attention_tiles import tile_kernel
from hotgraph_server.kernels.few_rows import few_rows_linear, few_rows_qkv, has_pdl
from hotgraph_server.kernels.rope import RopePlan
from tests.server.kernels.naive_attention import Case, Problem, attend, make_problem, naive_attention, plan_of

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Of results made of normally distributed values: rounding of weights and results."""
DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (24, 40))
GROUPS = (1, 3, 4, 8, 71)
WINDOWS = (None, 1, 17, 128, 1000)
KINDS = ("decode", "prefill", "mixed")
MAX_CONTEXT = 3000


def random_rows(kind: str, generator: random.Random, *, max_rows: int = 64, max_tokens: int = 600) -> Case:
    """Rows of one token, longer ones with some or no past, or both; contexts of 1 to MAX_CONTEXT tokens, most of them short."""

    def context(at_least: int = 1) -> int:
        return min(MAX_CONTEXT, at_least - 1 + int(MAX_CONTEXT ** generator.random()))

    num_decode_rows = 0 if kind == "prefill" else generator.randint(1, max_rows // (1 if kind == "decode" else 2))
    query_lens = [1] * num_decode_rows
    if kind != "decode":
        for _ in range(generator.randint(1, max(1, max_rows // 8))):
            room = max_tokens - sum(query_lens)
            if room >= 2:
                query_lens.append(generator.randint(2, room))
    context_lens = [context(length) for length in query_lens]
    # The longest there may be is always among them.
    context_lens[0] = MAX_CONTEXT
    return Case(query_lens, context_lens)


def padded(case: Case, num_tokens: int, num_rows: int) -> Case:
    """The case as a step of so many tokens and rows."""
    return replace(
        case,
        num_padding_rows=num_rows - len(case.query_lens),
        num_padding_tokens=num_tokens - sum(case.query_lens),
    )


def count_variants() -> int:
    """Compiled kernels there are in this process."""
    device = torch.cuda.current_device()
    return sum(len(kernel.device_caches[device][0]) for kernel in (decode_kernel, tile_kernel))


def check(result: torch.Tensor, problem: Problem) -> None:
    tolerance = TOLERANCES[problem.case.dtype]
    torch.testing.assert_close(result.double(), naive_attention(problem), atol=tolerance, rtol=tolerance)
    assert not result[problem.num_real_tokens :].any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_definition(kind: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows, groups, windows, caps, sinks and padding drawn anew for every kind of step, dimension and dtype; no NaN is read."""
    generator = random.Random(f"{kind} {dims} {dtype}")
    group = generator.choice(GROUPS)
    num_kv_heads = 1 if group == 71 else generator.choice((1, 2, 5, 8))
    case = replace(
        random_rows(kind, generator),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        key_dim=dims[0],
        value_dim=dims[1],
        block_size=generator.choice((8, 16, 16, 64)),
        window=generator.choice(WINDOWS),
        softcap=generator.choice((None, None, 3.0)),
        has_sinks=generator.random() < 0.3,
        dtype=dtype,
    )
    num_rows = len(case.query_lens) + generator.randint(0, 3)
    num_tokens = num_rows if kind == "decode" else sum(case.query_lens) + generator.randint(0, 40)
    problem = make_problem(padded(case, num_tokens, max(num_rows, 1)), generator.randrange(1000), CUDA)
    check(attend(problem), problem)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_with_every_window(group: int, window: int | None) -> None:
    """In 16 bits, with a cap and sinks, for decode and mixed steps of many rows and of one."""
    for seed, (kind, max_rows) in enumerate(itertools.product(("decode", "mixed"), (2, 64))):
        case = replace(
            random_rows(kind, random.Random(seed), max_rows=max_rows, max_tokens=300),
            num_heads=group * 2,
            num_kv_heads=2,
            key_dim=64,
            value_dim=64,
            block_size=16,
            window=window,
            softcap=3.0,
            has_sinks=True,
            dtype=torch.float16,
        )
        problem = make_problem(case, seed, CUDA)
        check(attend(problem), problem)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("kind", "num_tokens", "num_rows"), [("decode", 5, 5), ("decode", 64, 64), ("mixed", 160, 8), ("prefill", 96, 1)]
)
def test_a_graph_holds_for_all_lengths(kind: str, num_tokens: int, num_rows: int, group: int) -> None:
    """A graph captured over one step gives, replayed over others of its shape, what the same kernels give eagerly, bit for bit.

    Nothing is compiled for it: the kernels were used before with another shape.
    """

    def problem_of(seed: int, tokens: int, rows: int) -> Problem:
        generator = random.Random(seed)
        case = random_rows(kind, generator, max_rows=generator.randint(2, max(2, rows)), max_tokens=tokens)
        case = replace(
            padded(
                replace(case, query_lens=case.query_lens[:rows], context_lens=case.context_lens[:rows]), tokens, rows
            ),
            num_heads=4 * group,
            num_kv_heads=4,
            key_dim=128,
            value_dim=128,
            block_size=16,
            dtype=torch.float16,
        )
        # Every problem has the sizes of the largest, as an engine's buffers have.
        max_blocks = -(-MAX_CONTEXT // 16)
        return make_problem(case, seed, CUDA, num_blocks=64 * max_blocks + 1, max_blocks=max_blocks)

    for tokens, rows in ((num_tokens + 1, num_rows + 1), (num_tokens - 1, max(1, num_rows - 1))):
        attend(problem_of(0, tokens if kind != "decode" else rows, rows))
    static = problem_of(1, num_tokens, num_rows)
    num_variants = count_variants()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        plan = plan_of(static)
        # As layers do, one after the other with one plan.
        results = [attend(static, plan) for _ in range(3)]
    assert count_variants() == num_variants > 0
    for seed in range(2, 10):
        problem = problem_of(seed, num_tokens, num_rows)
        for name in ("query", "keys", "values", "block_tables", "context_lens", "query_starts"):
            getattr(static, name).copy_(getattr(problem, name))
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        eager = attend(problem)
        check(eager, problem)
        for result in results:
            assert torch.equal(result, eager)


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_the_same_bits_every_time(kind: str) -> None:
    """Whichever split of a row is the last to finish, and whatever runs beside it."""
    case = replace(
        random_rows(kind, random.Random(1), max_rows=8),
        num_heads=8,
        num_kv_heads=4,
        key_dim=128,
        value_dim=128,
        block_size=16,
        dtype=torch.float16,
    )
    problem = make_problem(case, 1, CUDA)
    plan = plan_of(problem)
    first = attend(problem, plan)
    check(first, problem)
    other_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    noise = torch.randn(2048, 2048, device=CUDA)
    for _ in range(50):
        with torch.cuda.stream(other_stream):
            noise @ noise
        assert torch.equal(attend(problem, plan), first)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(16, 16), (16, 4)], ids=["MHA", "GQA"])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8])
def test_in_a_chain_it_waits_for_what_the_step_writes(num_rows: int, num_heads: int, num_kv_heads: int) -> None:
    """Behind the product that makes queries, keys and values, of which it reads none too early, nor do layers meet in scratch.

    All of these are NaN before each layer's product, which takes long as its weight is large.
    """
    if not has_pdl(CUDA):
        pytest.skip("this GPU has no programmatic dependent launch")
    generator = random.Random(num_rows)
    lengths = [generator.choice((1, 16, 17, 33, 64, 257, 700, MAX_CONTEXT)) for _ in range(num_rows)]
    case = Case([1] * num_rows, lengths, num_heads, num_kv_heads, 128, 128, block_size=16, dtype=torch.float16)
    problem = make_problem(case, num_rows, CUDA)
    positions = problem.context_lens.long() - 1
    blocks = problem.block_tables.gather(1, (positions // 16)[:, None])[:, 0]
    own = blocks.long() * 16 + positions % 16
    hidden = 4096
    weight = torch.randn((num_heads + 2 * num_kv_heads) * 128, hidden, dtype=torch.float16, device=CUDA) * hidden**-0.5
    x, norm = torch.randn(num_rows, hidden, dtype=torch.float16, device=CUDA), torch.ones_like(weight[0])
    angles = torch.randn(MAX_CONTEXT, 64, device=CUDA)
    rope = RopePlan(torch.cat((angles.cos(), angles.sin()), dim=1), positions, None)
    output = torch.randn(hidden, num_heads * 128, dtype=torch.float16, device=CUDA)
    layers = [(problem.keys.clone(), problem.values.clone()) for _ in range(4)]
    plan = plan_of(problem)

    def run(*, pdl: bool) -> list[torch.Tensor]:
        results = []
        for keys, values in layers:
            query = torch.full_like(problem.query, torch.nan)
            for cache in (keys, values):
                cache.flatten(0, 1).index_fill_(0, own, torch.nan)
            few_rows_qkv(x, weight, rope, own, keys, values, query, norm=norm, epsilon=1e-5, pdl=pdl)
            result = paged_attention(query, keys, values, plan, scaling=problem.scaling, pdl=pdl)
            few_rows_linear(result.flatten(1), output, pdl=pdl)
            results.append(result)
        return results

    expected = run(pdl=False)
    run(pdl=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(pdl=True)
    for _ in range(50):
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("group", [1, 4])
def test_a_long_row_in_a_full_grid(group: int) -> None:
    """Split where it is long, beside rows that are not, it gives the definition, and the same bits whatever these are."""
    lengths = [9000, 2048, 2049, *[300] * 61]
    case = Case([1] * 64, lengths, 8 * group, 8, 128, 128, block_size=16, dtype=torch.float16)
    problem = make_problem(case, 1, CUDA, max_blocks=600)
    result = attend(problem)
    check(result, problem)
    problem.context_lens[3:] = 1
    beside_short_rows = attend(problem)
    assert torch.equal(beside_short_rows[:3], result[:3])
    assert not torch.equal(beside_short_rows[3:], result[3:])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("num_rows", [2, 4, 8, 64])
def test_rows_of_all_lengths_beside_each_other(num_rows: int, group: int) -> None:
    """One long row wherever it stands, and more long rows than there are programs for: the definition, the same bits again."""
    for lengths in (
        [9000, *[40] * (num_rows - 1)],
        [*[40] * (num_rows - 1), 9000],
        [9000 - 100 * (row % 8) for row in range(num_rows)],
        [9000 if row % 2 else 1 for row in range(num_rows)],
    ):
        case = Case([1] * num_rows, lengths, 8 * group, 8, 128, 128, block_size=16, dtype=torch.float16)
        problem = make_problem(case, 1, CUDA, max_blocks=600)
        plan = plan_of(problem)
        result = attend(problem, plan)
        check(result, problem)
        assert torch.equal(attend(problem, plan), result)


def seconds_per_call(calls: list[Callable[[], torch.Tensor]]) -> float:
    """In a graph of all of them, one after the other, the median of 20 replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2] / len(calls)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 32), (32, 8)], ids=["MHA", "GQA"])
def test_timing(num_heads: int, num_kv_heads: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each layer of a timed graph, with caches that no L2 holds, gives the definition's result; prints what it took."""
    steps = {
        f"decode R={rows} ctx {length}": ([1] * rows, [length] * rows) for rows in (1, 8, 64) for length in (256, 1024)
    }
    steps |= {f"prefill {length}": ([length], [length]) for length in (128, 512)}
    steps["mixed 64 + 8 x ctx 1024"] = ([1] * 8 + [64], [1024] * 8 + [64])
    lines = []
    for name, (query_lens, context_lens) in steps.items():
        case = Case(query_lens, context_lens, num_heads, num_kv_heads, 128, 128, block_size=16, dtype=torch.float16)
        problem = make_problem(case, 1, CUDA)
        layer_bytes = 2 * sum(context_lens) * num_kv_heads * 128 * 2
        # Twice what the L2 of an H100 or H200 holds, at least.
        num_layers = max(2, -(-120_000_000 // layer_bytes))
        layers = [(problem.keys.clone(), problem.values.clone()) for _ in range(num_layers)]
        out = torch.empty(num_layers, *problem.query.shape, dtype=case.dtype, device=CUDA)
        plan = plan_of(problem)
        calls = [call_of(problem, plan, keys, values, out[index]) for index, (keys, values) in enumerate(layers)]
        seconds = seconds_per_call(calls)
        check(out[0], problem)
        assert all(torch.equal(result, out[0]) for result in out)
        lines.append(f"{name:26} {seconds * 1e6:8.1f} us {layer_bytes / seconds / 1e12:6.2f} TB/s")
        del layers, calls
    with capsys.disabled():
        print(f"\n{num_heads} query heads, {num_kv_heads} KV heads, dim 128, fp16, a layer")
        print("\n".join(lines))


def call_of(
    problem: Problem, plan: AttentionPlan, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
) -> Callable[[], torch.Tensor]:
    return lambda: paged_attention(problem.query, keys, values, plan, scaling=problem.scaling, out=out)
