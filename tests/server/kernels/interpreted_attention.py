"""The attention kernels in Triton's interpreter, on the CPU. `test_attention_triton.py` runs this in a process of its own."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl  # type: ignore[import-untyped]  # it comes without types
from triton.runtime import interpreter  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels import attention_cuts, attention_triton
from hotgraph_server.kernels.attention_cuts import Cut
from hotgraph_server.kernels.attention_rows import DeviceRows
from hotgraph_server.kernels.attention_triton import launches, triton_attention
from tests.server.kernels.naive_attention import Case, Problem, make_problem, naive_attention

CASES: dict[str, Case] = {
    "decode": Case([1, 1, 1], [1, 8, 37], num_heads=2, num_kv_heads=2, num_padding_rows=1, num_padding_tokens=1),
    "decode, many splits": Case([1], [700], num_heads=1, num_kv_heads=1),
    "decode, not split": Case([1, 1], [70, 20], num_heads=2, num_kv_heads=2, has_sinks=True),
    "decode, not split, group of 3": Case([1, 1], [70, 20], num_heads=3, num_kv_heads=1, window=64),
    "decode, long rows split": Case(
        [1, 1, 1], [120, 32, 40], num_heads=2, num_kv_heads=2, num_padding_rows=1, num_padding_tokens=1
    ),
    "decode, long rows split, group of 3": Case([1, 1], [70, 20], num_heads=3, num_kv_heads=1, has_sinks=True),
    "decode, more long rows than programs for them": Case(
        [1] * 4, [250, 20, 500, 300], num_heads=2, num_kv_heads=1, num_padding_rows=1, num_padding_tokens=1
    ),
    "decode, long rows, more than are looked at together": Case(
        [1] * 70, [5] * 66 + [90, 5, 200, 1], num_heads=1, num_kv_heads=1
    ),
    "mixed, long rows split": Case([1, 1, 9], [90, 20, 40], num_heads=2, num_kv_heads=2, num_padding_tokens=2),
    "decode, group of 3": Case([1, 1], [70, 3], num_heads=9, num_kv_heads=3),
    "decode, splits, group of 35 in two blocks": Case([1], [150], num_heads=35, num_kv_heads=1),
    "decode, splits, window, softcap and sinks": Case(
        [1, 1],
        [1, 80],
        num_heads=2,
        num_kv_heads=2,
        window=50,
        softcap=2.0,
        has_sinks=True,
        num_padding_rows=1,
        num_padding_tokens=1,
    ),
    "decode, splits, group, window, softcap and sinks": Case(
        [1, 1], [90, 10], num_heads=6, num_kv_heads=2, window=80, softcap=2.0, has_sinks=True
    ),
    "decode, dimensions that are no powers of two": Case([1], [40], key_dim=24, value_dim=10),
    "decode, 16 bits": Case([1, 1], [60, 640], num_heads=1, num_kv_heads=1, dtype=torch.float16),
    "decode, bfloat16": Case([1], [100], num_heads=1, num_kv_heads=1, window=70, dtype=torch.bfloat16),
    "decode, 16 bits, group of 4": Case([1, 1], [60, 700], num_kv_heads=1, softcap=2.0, dtype=torch.float16),
    "decode, 16 bits, dimensions that are odd": Case([1], [40], 1, 1, key_dim=9, value_dim=10, dtype=torch.float16),
    "prefill": Case([70], [70], num_heads=2, num_kv_heads=2),
    "a token alone in a longer step": Case([1], [30], num_padding_tokens=3),
    "chunk after a past": Case([5], [90], num_heads=6, num_kv_heads=2),
    "prefill, group of 35 in two blocks": Case([3, 4], [3, 20], num_heads=35, num_kv_heads=1),
    "prefill, dimensions that are no powers of two": Case([9], [13], key_dim=10, value_dim=24, num_padding_tokens=2),
    "prefill, 16 bits": Case([9], [33], num_heads=4, num_kv_heads=2, dtype=torch.float16),
    "mixed": Case(
        [1, 1, 40, 7], [40, 9, 40, 30], num_heads=6, num_kv_heads=2, num_padding_rows=4, num_padding_tokens=9
    ),
    "mixed, window, softcap and sinks": Case(
        [1, 30, 2], [60, 61, 2], window=13, softcap=2.0, has_sinks=True, num_padding_rows=1, num_padding_tokens=3
    ),
    "mixed, more rows than are looked at together": Case(
        [1] * 4 + [2] * 66, [5] * 70, num_heads=1, num_kv_heads=1, num_padding_rows=3, num_padding_tokens=1
    ),
    "padding only": Case([], [], num_padding_rows=2, num_padding_tokens=2, has_sinks=True),
    "padding only, more tokens than rows": Case([], [], num_padding_rows=2, num_padding_tokens=5, has_sinks=True),
}


TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def bounds_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.6 cannot take tensors for the bounds of a loop, with a current numpy."""

    def to_int(bound: Any) -> int:
        return int(bound.handle.data.item()) if hasattr(bound, "handle") else int(bound)

    monkeypatch.setattr(interpreter, "range", lambda *bounds: builtins.range(*map(to_int, bounds)), raising=False)


@pytest.fixture(autouse=True)
def _new_plans() -> Iterator[None]:
    """What is planned depends on constants that tests replace."""
    attention_triton._plans.cache_clear()
    yield
    attention_triton._plans.cache_clear()


def rows_of(problem: Problem) -> DeviceRows:
    return DeviceRows(
        block_tables=problem.block_tables,
        context_lens=problem.context_lens,
        query_starts=problem.query_starts,
        num_tokens=problem.num_tokens,
        block_size=problem.case.block_size,
    )


def split_long_rows(monkeypatch: pytest.MonkeyPatch, most_share: int = 32) -> None:
    """From now on shares are short, and one program of each row and head takes those that have none of their own."""
    cut = attention_cuts.decode_cut

    def of_short_shares(*arguments: Any) -> Cut:
        return replace(cut(*arguments), least_share=16)

    monkeypatch.setattr(attention_triton, "decode_cut", of_short_shares)
    monkeypatch.setattr(attention_cuts, "LONG_SHARE", most_share)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They give what the definition gives and 0 for padding, read no NaN, and leave the scratch ready for the next layer."""
    case = CASES[name]
    if "not split" in name or "long rows" in name:
        # A grid that is full by itself would take minutes here.
        monkeypatch.setattr(attention_cuts, "MULTIPROCESSORS", 0)
    if "long rows" in name:
        split_long_rows(monkeypatch)
    problem = make_problem(case, seed=list(CASES).index(name))
    rows = rows_of(problem)
    out = torch.full((problem.num_tokens, case.num_heads, case.value_dim), torch.nan, dtype=case.dtype)
    arguments: dict[str, Any] = {
        "scaling": problem.scaling,
        "window": case.window,
        "softcap": case.softcap,
        "sinks": problem.sinks,
    }
    planned = launches(problem.query, problem.keys, problem.values, rows, out, **arguments)
    assert len(planned) == (2 if problem.num_tokens > len(problem.context_lens) > 1 else 1)
    arrivals = planned[0].arguments.get("arrivals")
    if "split" in name:
        assert (planned[0].grid[2] == 1) == ("not split" in name)
    if "long rows" in name:
        assert planned[0].arguments["even_bits"] == 0
        assert planned[0].grid[2] == 2

    triton_attention(problem.query, problem.keys, problem.values, rows, out, **arguments)

    tolerance = TOLERANCES[case.dtype]
    torch.testing.assert_close(out.double(), naive_attention(problem), atol=tolerance, rtol=0)
    assert not out[problem.num_real_tokens :].any()
    assert arrivals is None or not arrivals.any()


@pytest.mark.parametrize("name", ["chunk after a past", "decode, group of 3"])
def test_queries_may_lie_in_any_order(name: str) -> None:
    """A query that is a part of a wider tensor, or has its heads outermost, gives what a contiguous one gives."""
    case = CASES[name]
    problem = make_problem(case, seed=1)
    wider = torch.cat((problem.query, torch.full_like(problem.query, torch.nan)), dim=1)
    heads_outermost = problem.query.transpose(0, 1).contiguous().transpose(0, 1)
    expected = naive_attention(problem)
    for query in (wider[:, : case.num_heads], heads_outermost):
        assert not query.is_contiguous()
        out = torch.empty_like(problem.query)
        triton_attention(
            query,
            problem.keys,
            problem.values,
            rows_of(problem),
            out,
            scaling=problem.scaling,
            window=None,
            softcap=None,
            sinks=None,
        )
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("is_full", [False, True], ids=["split", "full grid"])
@pytest.mark.parametrize("name", ["MHA", "GQA", "16 bits", "window", "mixed"])
def test_before_its_wait_it_needs_nothing_of_this_step(
    name: str, is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, and keys and values of the step's tokens, may be missing until a program waits; and it writes nothing before.

    Lengths around two tiles and whole shares, so that the token's own position is everywhere: in the first tile, in the second
    and beyond.
    """
    lengths = [1, 16, 17, 33, 65, 257, 300]
    case = {
        "MHA": Case([1] * len(lengths), lengths, num_heads=1, num_kv_heads=1, num_padding_rows=1),
        "GQA": Case([1] * len(lengths), lengths, num_heads=3, num_kv_heads=1, num_padding_rows=1),
        "16 bits": Case([1] * len(lengths), lengths, num_heads=1, num_kv_heads=1, dtype=torch.float16),
        "window": Case([1] * len(lengths), lengths, num_heads=1, num_kv_heads=1, window=50),
        "mixed": Case([1, 1, 5, 9], [40, 16, 20, 9], num_heads=2, num_kv_heads=2),
    }[name]
    if is_full:
        monkeypatch.setattr(attention_cuts, "MULTIPROCESSORS", 0)
        monkeypatch.setattr(attention_cuts, "FULL_GRID", 1)
        monkeypatch.setattr(attention_cuts, "FEW_GROUPS", 0)
        split_long_rows(monkeypatch, 64)
    problem = make_problem(replace(case, num_padding_tokens=case.num_padding_rows), seed=1)
    out = torch.full_like(problem.query, torch.nan)
    own = own_places(problem)
    whole = [tensor.clone() for tensor in (problem.query, problem.keys, problem.values)]
    launch = launches(
        problem.query,
        problem.keys,
        problem.values,
        rows_of(problem),
        out,
        scaling=problem.scaling,
        window=case.window,
        softcap=None,
        sinks=None,
        pdl=True,
    )[0]
    written = [launch.arguments[name] for name in ("sums", "maxima", "totals")]
    arrivals = launch.arguments["arrivals"]
    num_waits, num_starts = 0, 0
    seen: list[torch.Tensor] = []

    def states() -> list[torch.Tensor]:
        return [tensor.nan_to_num(nan=-7.0).clone() for tensor in (out, *written)]

    def begin_program(*arguments: int) -> None:
        nonlocal num_starts, seen
        set_grid_index(*arguments)
        num_starts += 1
        problem.query.fill_(torch.nan)
        for tensor in (problem.keys, problem.values):
            tensor.flatten(0, 1)[own] = torch.nan
        seen = states()

    def wait() -> None:
        nonlocal num_waits
        num_waits += 1
        assert all(map(torch.equal, states(), seen)), "nothing is written before the wait"
        for tensor, full in zip((problem.query, problem.keys, problem.values), whole, strict=True):
            tensor.copy_(full)

    set_grid_index = interpreter.interpreter_builder.set_grid_idx
    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", begin_program)
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", wait)
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: None)
    # It knows no threads either.
    monkeypatch.setattr(tl, "inline_asm_elementwise", lambda asm, constraints, arguments, **options: arguments[0])
    arguments = {name: value for name, value in launch.arguments.items() if name != "launch_pdl"}
    launch.kernel[launch.grid](**arguments)

    num_programs = math.prod(launch.grid)
    assert num_starts == num_programs
    assert num_programs // launch.grid[2] <= num_waits <= num_programs
    for tensor, full in zip((problem.query, problem.keys, problem.values), whole, strict=True):
        tensor.copy_(full)
    is_decode = [length == 1 for length in case.query_lens]
    num_decode = sum(is_decode)
    expected = naive_attention(problem)[:num_decode]
    torch.testing.assert_close(out[:num_decode].double(), expected, atol=TOLERANCES[case.dtype], rtol=0)
    assert not arrivals.any()


def own_places(problem: Problem) -> torch.Tensor:
    """Where in the cache this step's tokens stand."""
    size = problem.case.block_size
    places = []
    for row, (num_new, length) in enumerate(zip(problem.case.query_lens, problem.case.context_lens, strict=True)):
        positions = torch.arange(length - num_new, length)
        places.append(problem.block_tables[row][positions // size].long() * size + positions % size)
    return torch.cat(places)


@pytest.mark.parametrize("group", [1, 3])
def test_a_row_is_the_same_whatever_stands_beside_it(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a full grid, split only where it is long, a row gives the same bits beside long rows and short ones."""
    monkeypatch.setattr(attention_cuts, "MULTIPROCESSORS", 0)
    split_long_rows(monkeypatch)
    case = Case([1, 1], [90, 20], num_heads=group, num_kv_heads=1)
    problem = make_problem(case, seed=1, max_blocks=16)
    results = []
    for other in (1, 20):
        problem.context_lens[1] = other
        out = torch.empty_like(problem.query)
        triton_attention(
            problem.query,
            problem.keys,
            problem.values,
            rows_of(problem),
            out,
            scaling=problem.scaling,
            window=None,
            softcap=None,
            sinks=None,
        )
        results.append(out)
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])
