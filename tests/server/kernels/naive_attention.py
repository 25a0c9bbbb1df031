"""Attention by its definition in float64, and random problems for it: scattered blocks, NaN wherever nothing may be read.

Tests on the CPU, in Triton's interpreter and on a GPU share it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hotgraph_server.kernels.attention import AttentionPlan, paged_attention


@dataclass(frozen=True)
class Case:
    """Shape of a problem. Rows of one token come first; padding rows and tokens follow the real ones."""

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    num_heads: int = 4
    num_kv_heads: int = 4
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 8
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    dtype: torch.dtype = torch.float32
    num_padding_rows: int = 0
    num_padding_tokens: int = 0


@dataclass
class Problem:
    """A case with its tensors, all on one device; see `kernels.attention.AttentionPlan` and `paged_attention`."""

    case: Case
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    sinks: torch.Tensor | None
    scaling: float

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return len(self.query)

    @property
    def num_real_tokens(self) -> int:
        """Without padding."""
        return sum(self.case.query_lens)


def make_problem(
    case: Case,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    num_blocks: int | None = None,
    max_blocks: int | None = None,
) -> Problem:
    """Random numbers for a case. `num_blocks` of the cache and `max_blocks` of a row, when not as few as will do."""
    shuffle = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    num_rows = len(case.query_lens) + case.num_padding_rows
    sizes = [-(-length // case.block_size) for length in case.context_lens]
    # Block 0 is the scratch block; some blocks are nobody's.
    num_blocks = num_blocks or sum(sizes) + 3
    free = shuffle.sample(range(1, num_blocks), num_blocks - 1)
    width = max_blocks or max([*sizes, 0]) + 1
    tables = torch.zeros(num_rows, width, dtype=torch.int32)
    for row, size in enumerate(sizes):
        tables[row, :size] = torch.tensor([free.pop() for _ in range(size)], dtype=torch.int32)
    tables = tables.to(device)
    keys = torch.full((num_blocks, case.block_size, case.num_kv_heads, case.key_dim), torch.nan, device=device)
    values = torch.full((num_blocks, case.block_size, case.num_kv_heads, case.value_dim), torch.nan, device=device)
    keys, values = keys.to(case.dtype), values.to(case.dtype)
    for row, length in enumerate(case.context_lens):
        places = _places(tables[row], length, case.block_size)
        keys.flatten(0, 1)[places] = randn(length, case.num_kv_heads, case.key_dim)
        values.flatten(0, 1)[places] = randn(length, case.num_kv_heads, case.value_dim)
    starts = [0]
    for length in [*case.query_lens, *[0] * case.num_padding_rows]:
        starts.append(starts[-1] + length)
    return Problem(
        case=case,
        query=randn(starts[-1] + case.num_padding_tokens, case.num_heads, case.key_dim),
        keys=keys,
        values=values,
        block_tables=tables,
        context_lens=torch.tensor([*case.context_lens, *[0] * case.num_padding_rows], dtype=torch.int32, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        sinks=randn(case.num_heads) if case.has_sinks else None,
        # Scores of about 2, so that some keys weigh much more than others.
        scaling=2.0 * case.key_dim**-0.5,
    )


def plan_of(problem: Problem) -> AttentionPlan:
    """The plan of the problem's step. On a GPU it is not told the host's lengths."""
    case = problem.case
    is_on_host = not problem.query.is_cuda
    num_decode_rows = len(list(itertools.takewhile(lambda length: length == 1, case.query_lens)))
    return AttentionPlan(
        block_tables=problem.block_tables,
        context_lens=problem.context_lens,
        query_starts=problem.query_starts,
        num_tokens=problem.num_tokens,
        query_lens=case.query_lens if is_on_host else (),
        host_context_lens=case.context_lens if is_on_host else (),
        num_decode_rows=num_decode_rows if is_on_host else 0,
        block_size=case.block_size,
        dtype=case.dtype,
    )


def attend(problem: Problem, plan: AttentionPlan | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """`paged_attention` of the problem."""
    case = problem.case
    return paged_attention(
        problem.query,
        problem.keys,
        problem.values,
        plan or plan_of(problem),
        scaling=problem.scaling,
        window=case.window,
        softcap=case.softcap,
        sinks=problem.sinks,
        out=out,
    )


def naive_attention(problem: Problem) -> torch.Tensor:
    """float64 [T, heads, value_dim]; 0 for padding."""
    case = problem.case
    group = case.num_heads // case.num_kv_heads
    output = torch.zeros(
        problem.num_tokens, case.num_heads, case.value_dim, dtype=torch.float64, device=problem.query.device
    )
    token = 0
    for row, (query_len, context_len) in enumerate(zip(case.query_lens, case.context_lens, strict=True)):
        places = _places(problem.block_tables[row], context_len, case.block_size)
        keys = problem.keys.flatten(0, 1)[places].double().repeat_interleave(group, dim=1)
        values = problem.values.flatten(0, 1)[places].double().repeat_interleave(group, dim=1)
        query = problem.query[token : token + query_len].double()
        scores = torch.einsum("qhd,khd->hqk", query, keys) * problem.scaling
        if case.softcap is not None:
            scores = (scores / case.softcap).tanh() * case.softcap
        own = torch.arange(context_len - query_len, context_len, device=query.device)[:, None]
        other = torch.arange(context_len, device=query.device)[None, :]
        is_seen = (other <= own) & (other > own - (case.window or math.inf))
        weights = scores.exp() * is_seen
        total = weights.sum(-1)
        if problem.sinks is not None:
            total = total + problem.sinks.double().exp()[:, None]
        output[token : token + query_len] = torch.einsum("hqk,khd->qhd", weights / total[..., None], values)
        token += query_len
    return output


def _places(table: torch.Tensor, length: int, block_size: int) -> torch.Tensor:
    positions = torch.arange(length, device=table.device)
    return table[positions // block_size].long() * block_size + positions % block_size
