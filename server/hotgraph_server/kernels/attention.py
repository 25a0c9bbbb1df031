"""Causal attention over the paged cache: one call for all devices, in Triton on a GPU and in plain torch elsewhere.

It knows block tables and lengths, not requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from hotgraph_server.kernels.attention_reference import HostRows, reference_attention
from hotgraph_server.kernels.attention_rows import DeviceRows


class Step(Protocol):
    """What attention takes of a step; `models.interface.StepTensors` tells what the fields mean."""

    token_ids: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    query_lens: Sequence[int]
    host_context_lens: Sequence[int]
    num_decode_rows: int


class AttentionPlan:
    """One step's row bookkeeping, made once and used by every layer.

    block_tables: int32 [R, max_blocks]; context_lens: int32 [R], tokens of the row in the cache after the step;
    query_starts: int32 [R + 1], where each row's tokens start; `num_tokens`: T, padding included. With T = R every row has one
    token or none. Tokens beyond query_starts[R], and rows of no tokens and context 0, are padding: never read, their result 0.

    `query_lens`, `host_context_lens` and `num_decode_rows` (the first rows, with one token each) are the real rows' lengths on
    the host: used on the CPU, and on a GPU not looked at, so that a graph made with one plan holds for all steps of its shape.
    `block_size` is a power of two; `dtype` that of the queries.
    """

    def __init__(
        self,
        *,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        query_starts: torch.Tensor,
        num_tokens: int,
        query_lens: Sequence[int],
        host_context_lens: Sequence[int],
        num_decode_rows: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._host_rows: HostRows | None = None
        self._device_rows: DeviceRows | None = None
        if block_tables.is_cuda:
            self._device_rows = DeviceRows(
                block_tables=block_tables,
                context_lens=context_lens,
                query_starts=query_starts,
                num_tokens=num_tokens,
                block_size=block_size,
            )
        else:
            self._host_rows = HostRows(
                block_tables=block_tables,
                query_lens=query_lens,
                context_lens=host_context_lens,
                num_decode_rows=num_decode_rows,
                block_size=block_size,
                dtype=dtype,
            )

    @classmethod
    def for_step(cls, step: Step, *, block_size: int, dtype: torch.dtype) -> AttentionPlan:
        """The plan of a step; its tensors are kept, and read when the plan is used."""
        return cls(
            block_tables=step.block_tables,
            context_lens=step.context_lens,
            query_starts=step.query_starts,
            num_tokens=len(step.token_ids),
            query_lens=step.query_lens,
            host_context_lens=step.host_context_lens,
            num_decode_rows=step.num_decode_rows,
            block_size=block_size,
            dtype=dtype,
        )

    @property
    def host_rows(self) -> HostRows:
        """For the CPU."""
        assert self._host_rows is not None, "the plan is for a GPU"
        return self._host_rows

    @property
    def device_rows(self) -> DeviceRows:
        """For a GPU."""
        assert self._device_rows is not None, "the plan is for the CPU"
        return self._device_rows


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: AttentionPlan,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
    is_invariant: bool = False,
) -> torch.Tensor:
    """Each token's weighted sum of the values at its row's positions up to its own: [T, query heads, value_dim].

    query: [T, query heads, key_dim]; keys: [num_blocks, block_size, heads, key_dim], values alike, contiguous, holding this
    step's tokens already; query heads are a multiple of heads, and consecutive query heads share one. Scores are multiplied
    by `scaling`. `window`: tokens a query sees, itself among them. `softcap`: scores become softcap * tanh(score / softcap).
    `sinks`: [query heads], a score that takes weight and gives no value. Padding tokens give 0. `out`, contiguous, takes the
    result; without it one is made.
    With `pdl` (a GPU for which `few_rows.has_pdl` holds) the kernel of rows of one token starts while the one queued before
    still runs, and lets the one queued behind start too. Before it waits it reads lengths, tables, and a row's keys and values
    but those of the row's last position. So of the kernels queued before only the last may write queries, or keys and values of
    this step, and none of these may be at positions that another row reads; and it must be launched without `pdl`, or let
    others start only after its own wait, as a `few_rows_qkv` or a `few_rows_linear` that norms does (`triggers_late`): else
    what came before it might not be complete.
    With `is_invariant`, on a GPU, a token's result has the same bits whatever else is in the step, and however its row is cut
    into steps: see `attention_invariant.py`. Then `pdl` holds for rows of any length.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023; grouped
    queries: Ainslie et al., "GQA", 2023; softcap: Gemma 2; sinks: gpt-oss.
    """
    if not query.is_cuda:
        result = reference_attention(
            query, keys, values, plan.host_rows, scaling=scaling, window=window, softcap=softcap, sinks=sinks
        )
        return result if out is None else out.copy_(result)
    # Torch for the CPU alone comes without Triton.
    from hotgraph_server.kernels.attention_triton import triton_attention

    if out is None:
        out = query.new_empty(len(query), query.shape[1], values.shape[3])
    triton_attention(
        query,
        keys,
        values,
        plan.device_rows,
        out,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
        pdl=pdl,
        is_invariant=is_invariant,
    )
    return out
