"""Paged attention in plain torch against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotgraph_server.kernels.attention import AttentionPlan, paged_attention
from hotgraph_server.models.interface import StepTensors
from tests.server.kernels.naive_attention import Case, attend, make_problem, naive_attention


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Rows of one token, then rows of any number with some or no past: lengths in the step, lengths in the cache."""
    decode = draw(st.lists(st.integers(1, 21), max_size=4))
    prefill = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=3, min_size=0 if decode else 1))
    query_lens = [1] * len(decode) + [length for length, _ in prefill]
    return query_lens, decode + [length + past for length, past in prefill]


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
    step: tuple[list[int], list[int]],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    dims: tuple[int, int],
    num_padding: int,
    seed: int,
) -> None:
    """Any mix of rows, head counts, windows, caps and sinks, over scattered blocks, beside padding and unwritten slots."""
    query_lens, context_lens = step
    case = Case(
        query_lens,
        context_lens,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        key_dim=dims[0],
        value_dim=dims[1],
        block_size=4,
        window=window,
        softcap=softcap,
        has_sinks=has_sinks,
        num_padding_rows=num_padding,
        num_padding_tokens=num_padding,
    )
    problem = make_problem(case, seed)
    result = attend(problem)
    torch.testing.assert_close(result.double(), naive_attention(problem), atol=2e-5, rtol=1e-4)
    assert not result[problem.num_real_tokens :].any()


def test_the_definition_is_that_of_plain_loops() -> None:
    """What everything here is compared with equals sums over a token's positions, one after the other."""
    case = Case([1, 5], [7, 6], num_heads=4, num_kv_heads=2, block_size=4, window=4, softcap=2.0, has_sinks=True)
    problem = make_problem(case, seed=1)
    assert problem.sinks is not None
    expected = naive_attention(problem)
    tokens = [(0, 6)] + [(1, position) for position in range(1, 6)]
    for token, (row, position) in enumerate(tokens):
        for head in range(4):
            total = math.exp(float(problem.sinks[head]))
            summed = torch.zeros(case.value_dim, dtype=torch.float64)
            for seen in range(max(0, position - 3), position + 1):
                place = int(problem.block_tables[row, seen // 4]), seen % 4, head // 2
                score = float(problem.query[token, head].double() @ problem.keys[place].double()) * problem.scaling
                weight = math.exp(2.0 * math.tanh(score / 2.0))
                total += weight
                summed += weight * problem.values[place].double()
            torch.testing.assert_close(expected[token, head], summed / total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_differs_by_rounding_only(dtype: torch.dtype) -> None:
    """In 16 bits, with masks and without, the result is the definition's but for rounding."""
    case = Case([1, 1, 5], [6, 3, 11], num_heads=4, num_kv_heads=2, block_size=4, dtype=dtype)
    problem = make_problem(case, seed=0)
    result = attend(problem)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), naive_attention(problem), atol=3e-2, rtol=0)


@pytest.mark.parametrize("query_lens", [[1, 1], [1, 4]], ids=["decode", "mixed"])
def test_the_result_goes_where_it_is_asked_to_go(query_lens: list[int]) -> None:
    """With `out` the same numbers are written there, padding included, and `out` is returned."""
    problem = make_problem(Case(query_lens, [9, 6], num_padding_tokens=2), seed=3)
    out = torch.full_like(problem.query, torch.nan)
    assert attend(problem, out=out) is out
    assert torch.equal(out, attend(problem))


def test_a_plan_is_made_of_a_step() -> None:
    """The plan of a step's fields is that of the fields one by one."""
    problem = make_problem(Case([1, 4], [9, 6]), seed=4)
    step = StepTensors(
        token_ids=torch.zeros(5, dtype=torch.int64),
        positions=torch.zeros(5, dtype=torch.int64),
        kv_indices=torch.zeros(5, dtype=torch.int64),
        block_tables=problem.block_tables,
        context_lens=problem.context_lens,
        query_starts=problem.query_starts,
        last_indices=torch.zeros(2, dtype=torch.int64),
        query_lens=[1, 4],
        host_context_lens=[9, 6],
        num_decode_rows=1,
    )
    plan = AttentionPlan.for_step(step, block_size=problem.case.block_size, dtype=torch.float32)
    result = paged_attention(problem.query, problem.keys, problem.values, plan, scaling=problem.scaling)
    assert torch.equal(result, attend(problem))


def test_a_step_of_padding_only_gives_zeros() -> None:
    """A step without real rows reads nothing."""
    problem = make_problem(Case([], [], num_padding_rows=2, num_padding_tokens=2), seed=5)
    assert problem.keys.isnan().all()
    assert torch.equal(attend(problem), torch.zeros_like(problem.query))
