"""Paged attention against loops over tokens, heads and positions."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotgraph_server.kernels.attention import AttentionPlan, paged_attention

BLOCK_SIZE = 4
NUM_BLOCKS = 40


def naive(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: list[list[int]],
    query_lens: list[int],
    context_lens: list[int],
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The definition, in float64."""
    group = query.shape[1] // keys.shape[2]
    output = torch.zeros(query.shape[0], query.shape[1], values.shape[3], dtype=torch.float64)
    token = 0
    for table, query_len, context_len in zip(tables, query_lens, context_lens, strict=True):
        for position in range(context_len - query_len, context_len):
            first = 0 if window is None else max(0, position - window + 1)
            slots = [(table[p // BLOCK_SIZE], p % BLOCK_SIZE) for p in range(first, position + 1)]
            for head in range(query.shape[1]):
                seen_keys = torch.stack([keys[block, offset, head // group] for block, offset in slots]).double()
                seen_values = torch.stack([values[block, offset, head // group] for block, offset in slots]).double()
                scores = seen_keys @ query[token, head].double() * scaling
                if softcap is not None:
                    scores = (scores / softcap).tanh() * softcap
                exponentials = scores.exp()
                total = exponentials.sum() + (0.0 if sinks is None else math.exp(float(sinks[head])))
                output[token, head] = exponentials @ seen_values / total
            token += 1
    return output


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Decode rows, then prefill rows with some or no past: lengths in the step, lengths in the cache, decode rows."""
    decode = draw(st.lists(st.integers(1, 21), max_size=4))
    prefill = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=3, min_size=0 if decode else 1))
    query_lens = [1] * len(decode) + [length for length, _ in prefill]
    context_lens = decode + [length + past for length, past in prefill]
    return query_lens, context_lens, len(decode)


@settings(max_examples=60, deadline=None)
@given(
    step=steps(),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (9, 3)]),
    window=st.sampled_from([None, 1, 3, 8, 100]),
    softcap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
    dims=st.sampled_from([(8, 8), (6, 10)]),
    num_padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_it_is_the_definition(
    step: tuple[list[int], list[int], int],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    dims: tuple[int, int],
    num_padding: int,
    seed: int,
) -> None:
    """Any mix of rows, head counts, windows, caps and sinks, over scattered blocks, beside padding and unwritten slots."""
    query_lens, context_lens, num_decode_rows = step
    generator = torch.Generator().manual_seed(seed)
    keys = torch.full((NUM_BLOCKS, BLOCK_SIZE, heads[1], dims[0]), torch.nan)
    values = torch.full((NUM_BLOCKS, BLOCK_SIZE, heads[1], dims[1]), torch.nan)
    free = random.Random(seed).sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
    tables = []
    for length in context_lens:
        table = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
        tables.append(table)
        for position in range(length):
            place = table[position // BLOCK_SIZE], position % BLOCK_SIZE
            keys[place] = torch.randn(heads[1], dims[0], generator=generator)
            values[place] = torch.randn(heads[1], dims[1], generator=generator)
    num_tokens = sum(query_lens)
    query = torch.randn(num_tokens + num_padding, heads[0], dims[0], generator=generator)
    sinks = torch.randn(heads[0], generator=generator) if has_sinks else None
    width = max(map(len, tables)) + 1
    padded = [table + [0] * (width - len(table)) for table in tables] + [[0] * width] * num_padding
    plan = AttentionPlan(
        torch.tensor(padded, dtype=torch.int32),
        query_lens,
        context_lens,
        num_decode_rows,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
    )
    result = paged_attention(query, keys, values, plan, scaling=0.4, window=window, softcap=softcap, sinks=sinks)
    expected = naive(query, keys, values, tables, query_lens, context_lens, 0.4, window, softcap, sinks)
    torch.testing.assert_close(result[:num_tokens].double(), expected[:num_tokens], atol=2e-5, rtol=1e-4)
    assert not result[num_tokens:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_differs_by_rounding_only(dtype: torch.dtype) -> None:
    """In 16 bits, with masks and without, the result is float32's but for rounding."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 8, BLOCK_SIZE, 2, 16, generator=generator)
    query = torch.randn(7, 4, 16, generator=generator)
    tables = torch.tensor([[3, 1, 0], [2, 5, 0], [7, 4, 6]], dtype=torch.int32)
    results = []
    for each in (torch.float32, dtype):
        plan = AttentionPlan(tables, [1, 1, 5], [6, 3, 11], 2, block_size=BLOCK_SIZE, dtype=each)
        results.append(paged_attention(query.to(each), keys.to(each), values.to(each), plan, scaling=0.25))
    assert results[1].dtype == dtype
    torch.testing.assert_close(results[1].float(), results[0], atol=3e-2, rtol=0)


def test_a_step_of_padding_only_gives_zeros() -> None:
    """A step without real rows reads nothing."""
    plan = AttentionPlan(torch.zeros(2, 3, dtype=torch.int32), [], [], 0, block_size=BLOCK_SIZE, dtype=torch.float32)
    cache = torch.full((2, BLOCK_SIZE, 1, 8), torch.nan)
    assert not paged_attention(torch.ones(2, 1, 8), cache, cache, plan, scaling=1.0).any()
