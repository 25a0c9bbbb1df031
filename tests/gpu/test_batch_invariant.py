"""The batch-invariant mode on an NVIDIA GPU: the same bits alone and beside any others, of products, attention and engine."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from hotgraph_server.kernels.attention import AttentionPlan, paged_attention
from hotgraph_server.kernels.blas_rows import equal_rows
from hotgraph_server.kernels.few_rows import few_rows_reference
from hotgraph_server.kernels.logprobs import token_logprobs
from hotgraph_server.kernels.rope import RopePlan, rotary_table
from hotgraph_server.kernels.row_sums import row_cumsum, row_logsumexp
from hotgraph_server.kernels.tile_rows import runs_on, tile_rows_linear, tile_rows_qkv
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.request import FinishedEvent, Request, SamplingParams, StopParams, TokenLogprobs, TokensEvent
from tests.gpu.serving import Service, service
from tests.server.kernels.few_rows_checks import DTYPES, EPSILON, Product, assert_near, draw
from tests.server.kernels.naive_attention import Case, Problem, make_problem, naive_attention
from tests.server.models.driver import Driver, random_model, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(580)]

CUDA = torch.device("cuda:0")
ROWS = (1, 2, 3, 8, 9, 16, 33, 64, 65, 128, 200, 300)
PRODUCTS = {
    "7B qkv": Product(4096, 3 * 4096, has_norm=True, has_bias=True),
    "7B o": Product(4096, 4096, has_residual=True),
    "7B gate_up": Product(4096, 11008, has_norm=True, activation="silu"),
    "7B down": Product(11008, 4096, has_residual=True),
    "7B head": Product(4096, 32000, has_norm=True),
    "SmolLM2 qkv": Product(576, 960, has_norm=True),
    "SmolLM2 o": Product(576, 576, has_residual=True),
    "SmolLM2 gate_up": Product(576, 1536, has_norm=True, activation="silu"),
    "SmolLM2 down": Product(1536, 576, has_residual=True),
    "SmolLM2 head": Product(576, 49152, has_norm=True),
}
VOCABULARY = 8192
CONFIGS = {
    "SmolLM2's shape": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        pad_token_id=None,
    ),
    "a 7B Llama's sizes": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        pad_token_id=None,
    ),
}


def test_it_runs_here() -> None:
    """The GPU has the instructions; else nothing below says anything."""
    assert runs_on(CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dtype: torch.dtype) -> None:
    """Each row of so many rows is, bit for bit, that row alone, and at another place; and it is the definition's."""
    product = PRODUCTS[name]
    inputs = draw(product, max(ROWS), dtype, CUDA, seed=1)
    out_dtype = torch.float32 if "head" in name else dtype

    def run(rows: torch.Tensor) -> torch.Tensor:
        residual = None if inputs.residual is None else inputs.residual[rows]
        out = torch.full((len(rows), product.num_outputs), torch.nan, dtype=out_dtype, device=CUDA)
        return tile_rows_linear(
            inputs.x[rows].contiguous(),
            inputs.weight,
            out,
            bias=inputs.bias,
            norm=inputs.norm,
            epsilon=EPSILON,
            activation=product.activation,
            residual=residual,
            pdl=True,
        )

    every = torch.arange(max(ROWS), device=CUDA)
    alone = torch.cat([run(every[row : row + 1]) for row in range(max(ROWS))])
    expected = few_rows_reference(
        inputs.x,
        inputs.weight,
        bias=inputs.bias,
        norm=inputs.norm,
        epsilon=EPSILON,
        activation=product.activation,
        residual=inputs.residual,
    )
    assert_near(alone, expected, dtype)
    for num_rows in ROWS:
        assert torch.equal(run(every[:num_rows]), alone[:num_rows]), num_rows
        moved = torch.randperm(max(ROWS), generator=torch.Generator().manual_seed(num_rows))[:num_rows].to(CUDA)
        assert torch.equal(run(moved), alone[moved]), f"{num_rows} at other places"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["7B qkv", "7B down", "SmolLM2 gate_up"])
def test_cublas_where_it_is_taken(name: str, dtype: torch.dtype) -> None:
    """For most numbers of rows that were tried it has the bits of the product, also of another weight and of a graph."""
    product = replace(PRODUCTS[name], has_bias=False)
    inputs = draw(product, 512, dtype, CUDA, seed=4)
    found = equal_rows(inputs.weight, 512, was_normed=True)
    assert len(found) >= (8 if "down" in name else 20), sorted(found)
    other = torch.randn(inputs.weight.shape, device=CUDA).to(dtype)
    alone = torch.cat([tile_rows_linear(inputs.x[row : row + 1], other) for row in range(512)])
    for num_rows in found:
        out = torch.empty(num_rows, len(other), dtype=dtype, device=CUDA)
        torch.mm(inputs.x[:num_rows], other.t(), out=out)
        assert torch.equal(out, alone[:num_rows]), num_rows
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.mm(inputs.x[:num_rows], other.t(), out=out)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, alone[:num_rows]), f"{num_rows} in a graph"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "hidden"), [((32, 32, 128), 4096), ((32, 8, 128), 4096), ((9, 3, 64), 576)])
def test_queries_keys_and_values(heads: tuple[int, int, int], hidden: int, dtype: torch.dtype) -> None:
    """Turned queries, and keys and values in the cache, of each row are those of the row alone."""
    num_heads, num_kv_heads, head_dim = heads
    inputs = draw(
        Product(hidden, (num_heads + 2 * num_kv_heads) * head_dim, has_norm=True), max(ROWS), dtype, CUDA, seed=2
    )
    table = rotary_table(torch.rand(head_dim // 2, generator=torch.Generator().manual_seed(1)), 1.2, 700).to(CUDA)
    positions = torch.randperm(700, generator=torch.Generator().manual_seed(2))[: max(ROWS)].to(CUDA)
    slots = torch.randperm(400, generator=torch.Generator().manual_seed(3))[: max(ROWS)].to(CUDA)

    def run(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache = torch.zeros(2, 25, 16, num_kv_heads, head_dim, dtype=dtype, device=CUDA)
        rope = RopePlan.for_step(table, positions[rows], dtype)
        query = tile_rows_qkv(
            inputs.x[rows].contiguous(),
            inputs.weight,
            rope,
            slots[rows],
            cache[0],
            cache[1],
            norm=inputs.norm,
            epsilon=EPSILON,
            pdl=True,
        )
        return query, cache.flatten(1, 2)[:, slots[rows]].transpose(0, 1)

    every = torch.arange(max(ROWS), device=CUDA)
    lone = [run(every[row : row + 1]) for row in range(max(ROWS))]
    alone = [torch.cat(parts) for parts in zip(*lone, strict=True)]
    for num_rows in ROWS:
        for rows in (every[:num_rows], every.flip(0)[:num_rows]):
            for found, expected in zip(run(rows), alone, strict=True):
                assert torch.equal(found, expected[rows]), num_rows


def attend(problem: Problem) -> torch.Tensor:
    case = problem.case
    plan = AttentionPlan(
        block_tables=problem.block_tables,
        context_lens=problem.context_lens,
        query_starts=problem.query_starts,
        num_tokens=problem.num_tokens,
        query_lens=(),
        host_context_lens=(),
        num_decode_rows=0,
        block_size=case.block_size,
        dtype=case.dtype,
    )
    return paged_attention(
        problem.query,
        problem.keys,
        problem.values,
        plan,
        scaling=problem.scaling,
        window=case.window,
        softcap=case.softcap,
        sinks=problem.sinks,
        pdl=True,
        is_invariant=True,
    )


def step_of(problem: Problem, rows: list[tuple[int, int, int]]) -> Problem:
    """A step of other rows of the same cache: of row i of a problem of whole prompts its last n of its first m tokens."""
    starts = problem.query_starts.tolist()
    parts = [problem.query[starts[row] + length - num_new : starts[row] + length] for row, num_new, length in rows]
    ends = torch.tensor([num_new for _, num_new, _ in rows]).cumsum(0).tolist()
    case = replace(
        problem.case,
        query_lens=[num_new for _, num_new, _ in rows],
        context_lens=[length for _, _, length in rows],
    )
    return replace(
        problem,
        case=case,
        query=torch.cat(parts),
        block_tables=problem.block_tables[[row for row, _, _ in rows]],
        context_lens=torch.tensor([length for _, _, length in rows], dtype=torch.int32, device=CUDA),
        query_starts=torch.tensor([0, *ends], dtype=torch.int32, device=CUDA),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((32, 32, 128), {}),
        ((32, 8, 128), {}),
        ((9, 3, 64), {}),
        ((8, 4, 96), {}),
        ((8, 2, 64), {"window": 200, "softcap": 30.0}),
        ((8, 2, 64), {"has_sinks": True}),
    ],
    ids=str,
)
def test_attention(heads: tuple[int, int, int], options: dict[str, Any], dtype: torch.dtype) -> None:
    """A token of a whole prompt is, bit for bit, that token as a decode row, in a chunk, alone and beside 7 and 63 others."""
    num_heads, num_kv_heads, head_dim = heads
    lengths = [700, 64, 65, 1, 300, 129, 511, 33] + [17 + 29 * row % 600 for row in range(56)]
    case = Case(
        lengths,
        lengths,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        key_dim=head_dim,
        value_dim=head_dim,
        block_size=16,
        dtype=dtype,
        **options,
    )
    problem = make_problem(case, 1, CUDA, max_blocks=64)
    whole = attend(problem)
    starts = problem.query_starts.tolist()
    small = replace(case, query_lens=lengths[:8], context_lens=lengths[:8])
    reference = naive_attention(replace(problem, case=small, query=problem.query[: starts[8]]))
    torch.testing.assert_close(whole[: starts[8]].double(), reference, atol=2e-2, rtol=2e-2)

    def check(rows: list[tuple[int, int, int]]) -> None:
        expected = [whole[starts[row] + length - num_new : starts[row] + length] for row, num_new, length in rows]
        assert torch.equal(attend(step_of(problem, rows)), torch.cat(expected)), rows

    for length in (1, 2, 63, 64, 65, 128, 200, 256, 257, 513, 700):
        check([(0, 1, length)])
        check([(0, min(length, 5), length)])
        check([(0, 1, length), *((row, 1, lengths[row]) for row in range(1, 8))])
        check([*((row, 1, lengths[row]) for row in range(1, 64)), (0, 1, length)])
        check([(2, 1, 65), (0, min(length, 77), length), (4, 300, 300)])


def test_sums_of_rows() -> None:
    """Log-probabilities, and the sums that filters are made of, are those of the row alone."""
    logits = torch.randn(64, 32000, device=CUDA) * 3
    weights = torch.rand(64, 32000, device=CUDA).double()
    chosen = logits.argmax(dim=1)
    together, sums, running = token_logprobs(logits, chosen, 5), row_logsumexp(logits), row_cumsum(weights)
    torch.testing.assert_close(sums, torch.logsumexp(logits, dim=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(running, weights.cumsum(1), atol=1e-8, rtol=0)
    for row in (0, 5, 63):
        one = slice(row, row + 1)
        for found, expected in zip(token_logprobs(logits[one], chosen[one], 5), together, strict=True):
            assert torch.equal(found, expected[one])
        assert torch.equal(row_cumsum(weights[one]), running[one])


@pytest.fixture(scope="module", params=[(name, dtype) for name in CONFIGS for dtype in DTYPES], ids=str)
def model(request: pytest.FixtureRequest) -> Decoder:
    name, dtype = request.param
    source = random_model(CONFIGS[name])
    return Decoder.from_config(source.config, source.state_dict(), dtype=dtype, device=CUDA, batch_invariant=True)


def test_logits_do_not_depend_on_chunks_and_batches(model: Decoder) -> None:
    """Prompts at once and in chunks, token by token, alone and beside others, with an arena and without: the same logits."""
    prompts = {f"row {row}": random_tokens(150 + 31 * row, VOCABULARY, seed=row) for row in range(6)}
    alone = {name: Driver(model).step({name: tokens})[name] for name, tokens in prompts.items()}
    together = Driver(model, num_padding_tokens=9, num_padding_rows=2, arena=model.arena(2048, 64)).step(prompts)
    chunked = Driver(model, arena=model.arena(512, 64))
    rng = random.Random(1)
    left = {name: list(tokens) for name, tokens in prompts.items()}
    last: dict[str, torch.Tensor] = {}
    while left:
        step = {name: tokens[: rng.choice((1, 1, 2, 17, 64))] for name, tokens in left.items()}
        last |= chunked.step(step)
        left = {name: rest for name, tokens in left.items() if (rest := tokens[len(step[name]) :])}
    for name, logits in alone.items():
        assert torch.equal(together[name], logits), name
        assert torch.equal(last[name], logits), name


def test_long_steps_are_those_of_short_ones(model: Decoder) -> None:
    """Prompts of sizes that cuBLAS multiplies, with all that then stands alone around products, and in chunks of 100 tokens."""
    for num_tokens in (144, 160, 192, 256, 304, 400, 512, 640):
        tokens = random_tokens(num_tokens, VOCABULARY, seed=num_tokens)
        whole = Driver(model, arena=model.arena(640, 64)).step({"a": tokens})["a"]
        chunked = Driver(model, arena=model.arena(640, 64))
        for first in range(0, num_tokens, 100):
            last = chunked.step({"a": tokens[first : first + 100]})["a"]
        assert torch.equal(whole, last), num_tokens


def requests(num_requests: int) -> list[Request]:
    """Prompts of 1 to 700 tokens and completions of 4 to 40, greedy and seeded of all kinds, all with log-probabilities."""
    rng = random.Random(5)
    kinds = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=11),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, seed=12),
        SamplingParams(temperature=0.9, repetition_penalty=1.3, presence_penalty=0.4, seed=13),
    )
    return [
        Request(
            f"r{index}",
            tuple(random_tokens(rng.choice((1, 2, 9, 16, 17, 64, 65, 130, 257, 400, 700)), VOCABULARY, seed=index)),
            rng.randint(4, 40),
            sampling=kinds[index % len(kinds)],
            stop=StopParams(ignore_eos=True),
            omit_text=True,
            num_logprobs=3 if index % 2 else None,
        )
        for index in range(num_requests)
    ]


async def complete(served: Service, request: Request) -> tuple[list[int], list[TokenLogprobs]]:
    """Tokens and, where they were asked for, log-probabilities."""
    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    async with served.scheduler.submit(request) as stream:
        async for event in stream:
            if isinstance(event, TokensEvent):
                ids += event.token_ids
                logprobs += event.logprobs
            elif isinstance(event, FinishedEvent):
                return ids, logprobs
    raise AssertionError("a stream ended without its last event")


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["no prefixes", "prefixes shared"])
async def test_completions_are_those_of_lone_runs(model: Decoder, prefix_caching: bool) -> None:
    """Clients that come and go, 8 and 64 at once, before graphs are captured and after: the lone runs' tokens and numbers."""
    wanted = requests(96)
    async with service(model, prefix_caching=prefix_caching) as served:
        alone = [await complete(served, request) for request in wanted]
        assert sum(bool(logprobs) for _, logprobs in alone) == len(wanted) // 2
        for at_once in (8, 64, 64):
            gate = asyncio.Semaphore(at_once)

            async def one(request: Request, gate: asyncio.Semaphore = gate) -> tuple[list[int], list[TokenLogprobs]]:
                async with gate:
                    return await complete(served, request)

            found = await asyncio.gather(*map(one, wanted))
            await served.settle()
            for request, ours, theirs in zip(wanted, found, alone, strict=True):
                assert ours == theirs, f"{request.request_id} with {at_once} at once"
