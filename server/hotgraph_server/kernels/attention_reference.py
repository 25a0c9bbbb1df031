"""Causal attention over the paged cache in plain torch: decode rows in one batch, prefill rows one after the other.

It reads the lengths on the host, and copies the keys and values that a row sees out of their blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows that attend together: which tokens ask, where what they see lies, and what they do not see of it.

    `indices` are rows of a cache layer seen as [slots * heads, dim], head-major: rows x heads x `length`. `mask` is added to
    the scores; None with `is_causal` unset: everything is seen.
    """

    first_token: int
    last_token: int
    num_rows: int
    length: int
    indices: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool


class HostRows:
    """A step's rows as the host knows them.

    block_tables: int32 [R, max_blocks]; query_lens and context_lens: tokens of each real row in the step and, after it, in
    the cache; the first `num_decode_rows` rows have one token each; rows' tokens stand one after the other from token 0.
    Rows and tokens beyond these are padding: never read, and their result is 0. `dtype` is that of the queries.
    """

    def __init__(
        self,
        *,
        block_tables: torch.Tensor,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        num_decode_rows: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._block_tables = block_tables
        self._query_lens = query_lens
        self._context_lens = context_lens
        self._num_decode_rows = num_decode_rows
        self._block_size = block_size
        self._dtype = dtype
        self._parts: dict[tuple[int, int | None], list[_Part]] = {}

    def parts(self, num_heads: int, window: int | None) -> list[_Part]:
        """The rows' parts for layers with so many KV heads and this sliding window (tokens a query sees, itself among them)."""
        parts = self._parts.get((num_heads, window))
        if parts is None:
            parts = self._decode_parts(num_heads, window) + self._prefill_parts(num_heads, window)
            self._parts[num_heads, window] = parts
        return parts

    def _decode_parts(self, num_heads: int, window: int | None) -> list[_Part]:
        num_rows = self._num_decode_rows
        if num_rows == 0:
            return []
        lengths = self._context_lens[:num_rows]
        seen = [min(length, window) if window else length for length in lengths]
        length = max(seen)
        device = self._block_tables.device
        ends = torch.tensor(lengths, device=device).unsqueeze(-1)
        starts = ends - torch.tensor(seen, device=device).unsqueeze(-1)
        positions = starts + torch.arange(length, device=device)
        mask = None
        if min(seen) < length:
            mask = torch.zeros(positions.shape, dtype=self._dtype, device=device)
            mask = mask.masked_fill_(positions >= ends, -torch.inf)[:, None, None, :]
            # What is masked is multiplied by 0, and 0 times what happens to lie in the scratch block may be NaN.
            positions = torch.minimum(positions, ends - 1)
        slots = self._slots(self._block_tables[:num_rows], positions)
        return [_Part(0, num_rows, num_rows, length, _per_head(slots, num_heads), mask, is_causal=False)]

    def _prefill_parts(self, num_heads: int, window: int | None) -> list[_Part]:
        parts = []
        first_token = self._num_decode_rows
        device = self._block_tables.device
        for row in range(self._num_decode_rows, len(self._query_lens)):
            query_len, context_len = self._query_lens[row], self._context_lens[row]
            start = context_len - query_len
            first = max(0, start + 1 - window) if window else 0
            length = context_len - first
            slots = self._slots(
                self._block_tables[row : row + 1], torch.arange(first, context_len, device=device).unsqueeze(0)
            )
            is_windowed = window is not None and length > window
            is_causal = start == first and not is_windowed
            mask = None
            if not is_causal and (query_len > 1 or is_windowed):
                mask = _causal_mask(query_len, length, start - first, window, self._dtype, device)
            indices = _per_head(slots, num_heads)
            parts.append(_Part(first_token, first_token + query_len, 1, length, indices, mask, is_causal))
            first_token += query_len
        return parts

    def _slots(self, block_tables: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        blocks = block_tables.gather(1, positions // self._block_size).long()
        return blocks * self._block_size + positions % self._block_size


def _per_head(slots: torch.Tensor, num_heads: int) -> torch.Tensor:
    heads = torch.arange(num_heads, device=slots.device).unsqueeze(-1)
    return (slots.unsqueeze(1) * num_heads + heads).flatten()


def _causal_mask(
    num_queries: int, num_keys: int, offset: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """0 where query i sees key j (j <= i + offset, and within the window), else minus infinity."""
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(offset)
    if window is not None:
        visible = visible.triu_(offset - window + 1)
    return torch.zeros(num_queries, num_keys, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)


def reference_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: HostRows,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See `attention.paged_attention`."""
    num_tokens, num_query_heads, key_dim = query.shape
    num_heads, value_dim = values.shape[2], values.shape[3]
    group = num_query_heads // num_heads
    key_rows, value_rows = keys.view(-1, key_dim), values.view(-1, value_dim)
    output: torch.Tensor | None = None
    for part in rows.parts(num_heads, window):
        num_rows, length = part.num_rows, part.length
        key = key_rows.index_select(0, part.indices)
        value = value_rows.index_select(0, part.indices)
        asked = query[part.first_token : part.last_token]
        if part.last_token - part.first_token == num_rows:
            # One token a row: its query heads that share keys stand where a sequence's tokens would, so nothing is expanded.
            shape = (num_rows, num_heads, group, key_dim)
            key = key.view(num_rows, num_heads, length, key_dim)
            value = value.view(num_rows, num_heads, length, value_dim)
            head_sinks = None if sinks is None else sinks.view(1, num_heads, group, 1)
            result = _attend(asked.reshape(shape), key, value, part.mask, False, scaling, softcap, head_sinks)
        else:
            # One row: KV heads are the batch, and the query heads of each share its keys through a stride of 0.
            asked = asked.view(-1, num_heads, group, key_dim).permute(1, 2, 0, 3)
            key = key.view(num_heads, 1, length, key_dim).expand(-1, group, -1, -1)
            value = value.view(num_heads, 1, length, value_dim).expand(-1, group, -1, -1)
            head_sinks = None if sinks is None else sinks.view(num_heads, group, 1, 1)
            result = _attend(asked, key, value, part.mask, part.is_causal, scaling, softcap, head_sinks)
            result = result.permute(2, 0, 1, 3)
        result = result.reshape(-1, num_query_heads, value_dim)
        if len(result) == num_tokens:
            return result
        if output is None:
            output = query.new_zeros(num_tokens, num_query_heads, value_dim)
        output[part.first_token : part.last_token] = result
    return query.new_zeros(num_tokens, num_query_heads, value_dim) if output is None else output


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Dense attention over [batch, heads, tokens, dim]; `sinks` broadcasts to [batch, heads, tokens, 1]."""
    if softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling
        )
    scores = torch.matmul(query, key.transpose(-1, -2)).mul_(scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if is_causal:
        mask = _causal_mask(query.shape[-2], key.shape[-2], 0, None, query.dtype, query.device)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights[..., : key.shape[-2]], value)
