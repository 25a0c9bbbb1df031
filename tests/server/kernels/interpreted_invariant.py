"""Attention and sums of rows in one order, in the interpreter: `test_attention_invariant.py` runs it in a process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hotgraph_server.kernels import attention_cuts, attention_triton
from hotgraph_server.kernels.attention_triton import triton_attention
from hotgraph_server.kernels.row_sums import row_cumsum_triton, row_logsumexp_triton
from tests.server.kernels.interpreted_attention import CASES, TOLERANCES, bounds_of_loops, rows_of
from tests.server.kernels.naive_attention import Case, Problem, make_problem, naive_attention

__all__ = ["bounds_of_loops"]  # a fixture for all tests here


def attend_invariantly(problem: Problem) -> torch.Tensor:
    """`triton_attention` with `is_invariant`; the scratch must be left ready for the next layer."""
    case = problem.case
    rows = rows_of(problem)
    out = torch.full((problem.num_tokens, case.num_heads, case.value_dim), torch.nan, dtype=case.dtype)
    triton_attention(
        problem.query,
        problem.keys,
        problem.values,
        rows,
        out,
        scaling=problem.scaling,
        window=case.window,
        softcap=case.softcap,
        sinks=problem.sinks,
        is_invariant=True,
    )
    assert not any(bool(scratch.arrivals.any()) for scratch in rows._scratch.values())
    return out


NAMES = (
    "decode",
    "decode, splits, window, softcap and sinks",
    "decode, dimensions that are no powers of two",
    "decode, 16 bits, group of 4",
    "prefill",
    "a token alone in a longer step",
    "prefill, group of 35 in two blocks",
    "mixed, window, softcap and sinks",
    "mixed, more rows than are looked at together",
    "padding only",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_invariant_kernel_is_the_definition(name: str) -> None:
    """It gives what the definition gives and 0 for padding, for rows of one token and of many, and reads no NaN."""
    case = CASES[name]
    problem = make_problem(case, seed=list(CASES).index(name))
    out = attend_invariantly(problem)
    torch.testing.assert_close(out.double(), naive_attention(problem), atol=TOLERANCES[case.dtype], rtol=0)
    assert not out[problem.num_real_tokens :].any()


def lone(problem: Problem, row: int, num_new: int, context_len: int, *, num_padding_tokens: int = 0) -> Problem:
    """The last `num_new` of a row's first `context_len` tokens, in a step of their own.

    The step that the problem is must have had all of them.
    """
    case = problem.case
    first = (
        int(problem.query_starts[row]) - int(problem.context_lens[row]) + case.query_lens[row] + context_len - num_new
    )
    query = problem.query[first : first + num_new]
    return replace(
        problem,
        case=replace(
            case,
            query_lens=[num_new],
            context_lens=[context_len],
            num_padding_rows=0,
            num_padding_tokens=num_padding_tokens,
        ),
        query=torch.cat((query, query.new_full((num_padding_tokens, *query.shape[1:]), torch.nan))),
        block_tables=problem.block_tables[row : row + 1],
        context_lens=torch.tensor([context_len], dtype=torch.int32),
        query_starts=torch.tensor([0, num_new], dtype=torch.int32),
    )


@pytest.mark.parametrize(
    "case",
    [
        Case([150, 7, 90], [150, 40, 90], num_heads=2, num_kv_heads=2, num_padding_rows=1, num_padding_tokens=5),
        Case([150, 7, 90], [150, 40, 90], num_heads=6, num_kv_heads=2, has_sinks=True, dtype=torch.float16),
        Case([150, 7, 90], [150, 40, 90], num_heads=2, num_kv_heads=1, window=50, softcap=2.0, dtype=torch.float16),
    ],
    ids=["MHA", "GQA, sinks, 16 bits", "window, softcap, 16 bits"],
)
def test_a_token_is_the_same_however_it_is_asked(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, shared by any number of programs, in a chunk of any size and place, beside others and padding: the same bits."""
    problem = make_problem(case, seed=3)
    together = attend_invariantly(problem)
    for context_len, num_new, num_padding in (
        (150, 150, 0),
        (150, 37, 2),
        (133, 64, 0),
        (65, 1, 0),
        (128, 2, 1),
        (64, 9, 0),
    ):
        found = attend_invariantly(lone(problem, 0, num_new, context_len, num_padding_tokens=num_padding))
        assert torch.equal(found[:num_new], together[context_len - num_new : context_len]), (context_len, num_new)
    for multiprocessors in (0, 2, 132):
        monkeypatch.setattr(attention_cuts, "MULTIPROCESSORS", multiprocessors)
        attention_triton._plans.cache_clear()  # what was planned with another number of them
        for context_len in (1, 64, 65, 129, 150):
            found = attend_invariantly(lone(problem, 0, 1, context_len))
            assert torch.equal(found[0], together[context_len - 1]), (multiprocessors, context_len)
    later = int(problem.query_starts[2])
    assert torch.equal(attend_invariantly(lone(problem, 2, 1, 90))[0], together[later + 89])


@pytest.mark.parametrize("num_others", [7, 63])
def test_a_row_is_the_same_at_any_place_of_a_batch(num_others: int) -> None:
    """Rows of one token among others, and in a step with a prompt: the bits that each gives alone."""
    lengths = [1 + 37 * index % (140 if num_others < 63 else 70) for index in range(num_others + 1)]
    case = Case([1] * len(lengths), lengths, num_heads=1, num_kv_heads=1, dtype=torch.float16)
    problem = make_problem(case, seed=num_others)
    together = attend_invariantly(problem)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1))
    moved = replace(
        problem,
        query=problem.query[order],
        block_tables=problem.block_tables[order],
        context_lens=problem.context_lens[order],
    )
    assert torch.equal(attend_invariantly(moved), together[order])
    for row in (0, num_others):
        assert torch.equal(attend_invariantly(lone(problem, row, 1, lengths[row]))[0], together[row])
    mixed = replace(
        problem,
        case=replace(case, query_lens=[1] * num_others + [3]),
        query=torch.cat((problem.query, problem.query[:2])),
        query_starts=torch.tensor([*range(num_others + 1), num_others + 3], dtype=torch.int32),
    )
    assert torch.equal(attend_invariantly(mixed)[:num_others], together[:num_others])


def test_sums_of_rows() -> None:
    """Logarithms of sums and running sums are torch's, and a row's bits are those it gives alone."""
    x = torch.randn(5, 9000) * 4
    found = row_logsumexp_triton(x[:, :8999])
    torch.testing.assert_close(found, torch.logsumexp(x[:, :8999], dim=1), atol=1e-5, rtol=0)
    weights = torch.rand(5, 2100, dtype=torch.float64)
    sums = row_cumsum_triton(weights)
    torch.testing.assert_close(sums, weights.cumsum(1), atol=1e-11, rtol=0)
    for row in range(5):
        assert torch.equal(row_logsumexp_triton(x[row : row + 1, :8999]), found[row : row + 1])
        assert torch.equal(row_cumsum_triton(weights[row : row + 1]), sums[row : row + 1])
