"""From the QKV product to what attention reads: heads normed where the model does that, turned, and written to the paged cache.

It knows heads and slots of the cache, not a layer's weights. On the CPU it is made of norm, rope and write, which is the
reference; on a GPU one Triton kernel does the same.
"""

from __future__ import annotations

import torch

from hotgraph_server.kernels.again import launch
from hotgraph_server.kernels.jit import jit, next_power_of_two, tl
from hotgraph_server.kernels.kv_write import write_kv
from hotgraph_server.kernels.norm import rms_norm
from hotgraph_server.kernels.rope import RopePlan, apply_rope

# Elements of one program: 16 a thread, whose loads are 16 bytes wide in 16-bit dtypes.
_BLOCK = 2048


def rope_and_write_kv(
    qkv: torch.Tensor,
    rope: RopePlan,
    kv_indices: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    query_key_norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The turned queries [T, query heads, d], new or in `out`; turned keys, and values, go to slots `kv_indices` of the cache.

    qkv: [T, (query heads + 2 * KV heads) * d], the heads of queries, keys and values in this order, contiguous on a GPU; keys
    and values: [num_blocks, block_size, KV heads, d], contiguous, of qkv's dtype; kv_indices: int64 [T], see `write_kv`. With
    `query_key_norm` [query heads + KV heads, d] queries and keys are normed by `rms_norm` before they are turned. `out` is no
    part of qkv.
    """
    if qkv.is_cuda:
        return rope_and_write_kv_triton(
            qkv, rope, kv_indices, keys, values, query_key_norm=query_key_norm, epsilon=epsilon, out=out
        )
    num_kv_heads, head_dim = keys.shape[2:]
    heads = qkv.view(len(qkv), -1, head_dim)
    query_key, value = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if query_key_norm is not None:
        query_key = rms_norm(query_key, query_key_norm, epsilon)
    assert rope.factors is not None  # as always on the CPU
    query_key = apply_rope(query_key, rope.factors)
    query, key = query_key[:, :-num_kv_heads], query_key[:, -num_kv_heads:]
    write_kv(key, value, keys, values, kv_indices)
    return query if out is None else out.copy_(query)


def rope_and_write_kv_triton(
    qkv: torch.Tensor,
    rope: RopePlan,
    kv_indices: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    query_key_norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rope_and_write_kv` in one kernel, for contiguous tensors."""
    num_kv_heads, head_dim = keys.shape[2:]
    num_all_heads = qkv.shape[1] // head_dim
    num_heads = num_all_heads - 2 * num_kv_heads
    num_turned = rope.table.shape[1]
    half_block = next_power_of_two(num_turned // 2)
    heads_block = min(max(_BLOCK // (2 * half_block), 1), next_power_of_two(num_all_heads))
    out = qkv.new_empty(len(qkv), num_heads, head_dim) if out is None else out
    launch(
        _rope_kv_kernel,
        (len(qkv), -(-num_all_heads // heads_block)),
        {
            "qkv": qkv,
            "table": rope.table,
            "positions": rope.positions,
            "kv_indices": kv_indices,
            "norm_weight": qkv if query_key_norm is None else query_key_norm,
            "keys": keys,
            "values": values,
            "out": out,
        },
        {
            "epsilon": epsilon,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "half": num_turned // 2,
            "has_norm": query_key_norm is not None,
            "heads_block": heads_block,
            "half_block": half_block,
            "rest_block": next_power_of_two(head_dim - num_turned) if head_dim > num_turned else 0,
            "num_warps": 4,
        },
    )
    return out


@jit()
def _rope_kv_kernel(
    qkv: tl.tensor,
    table: tl.tensor,
    positions: tl.tensor,
    kv_indices: tl.tensor,
    norm_weight: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    epsilon: tl.tensor,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    has_norm: tl.constexpr,
    heads_block: tl.constexpr,
    half_block: tl.constexpr,
    rest_block: tl.constexpr,
) -> None:
    """One program a token and block of heads. `half` pairs of each head are turned; `rest_block` is 0 when that is all."""
    dtype = out.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads_block + tl.arange(0, heads_block)[:, None]
    pair = tl.arange(0, half_block)[None, :]
    is_turned = head < num_heads + num_kv_heads
    is_value = (head >= num_heads + num_kv_heads) & (head < num_heads + 2 * num_kv_heads)
    source = qkv + (token * (num_heads + 2 * num_kv_heads) + head) * head_dim
    is_inside = (pair < half) & (is_turned | is_value)
    first = tl.load(source + pair, mask=is_inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + pair, mask=is_inside, other=0.0).to(tl.float32)
    position = tl.load(positions + token)
    slot = tl.load(kv_indices + token)
    line = table + position * (2 * half) + pair
    cosine = tl.load(line, mask=pair < half, other=0.0).to(dtype).to(tl.float32)
    sine = tl.load(line + half, mask=pair < half, other=0.0).to(dtype).to(tl.float32)

    # Where each head goes. Only one of the three stores below happens for it.
    query_place = out + (token * num_heads + head) * head_dim
    key_place = keys + (slot * num_kv_heads + head - num_heads) * head_dim
    value_place = values + (slot * num_kv_heads + head - num_heads - num_kv_heads) * head_dim
    is_query = head < num_heads
    is_key = (head >= num_heads) & is_turned

    if rest_block > 0:
        kept = tl.arange(0, rest_block)[None, :] + 2 * half
        is_kept = (kept < head_dim) & (is_turned | is_value)
        rest = tl.load(source + kept, mask=is_kept, other=0.0).to(tl.float32)
    if has_norm:
        square = tl.sum(first * first + second * second, axis=1)
        if rest_block > 0:
            square += tl.sum(rest * rest, axis=1)
        scale = tl.rsqrt(square / head_dim + epsilon)[:, None]
        weight = norm_weight + head * head_dim
        is_normed = (pair < half) & is_turned
        # Rounded twice, as `rms_norm` does: see there.
        first_weight = tl.load(weight + pair, mask=is_normed, other=0.0).to(tl.float32)
        first_normed = ((first * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
        first = tl.where(is_turned, first_normed, first)
        second_weight = tl.load(weight + half + pair, mask=is_normed, other=0.0).to(tl.float32)
        second_normed = ((second * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
        second = tl.where(is_turned, second_normed, second)
        if rest_block > 0:
            rest_weight = tl.load(weight + kept, mask=is_kept & is_turned, other=0.0).to(tl.float32)
            rest_normed = ((rest * scale).to(dtype).to(tl.float32) * rest_weight).to(dtype).to(tl.float32)
            rest = tl.where(is_turned, rest_normed, rest)

    # The first product is rounded before the second is added, as `apply_rope` does.
    turned_first = (first * cosine).to(dtype).to(tl.float32) - second * sine
    turned_second = (second * cosine).to(dtype).to(tl.float32) + first * sine
    turned_first = tl.where(is_turned, turned_first, first).to(dtype)
    turned_second = tl.where(is_turned, turned_second, second).to(dtype)
    is_stored = pair < half
    tl.store(query_place + pair, turned_first, mask=is_stored & is_query)
    tl.store(query_place + half + pair, turned_second, mask=is_stored & is_query)
    tl.store(key_place + pair, turned_first, mask=is_stored & is_key)
    tl.store(key_place + half + pair, turned_second, mask=is_stored & is_key)
    tl.store(value_place + pair, turned_first, mask=is_stored & is_value)
    tl.store(value_place + half + pair, turned_second, mask=is_stored & is_value)
    if rest_block > 0:
        rest = rest.to(dtype)
        tl.store(query_place + kept, rest, mask=is_kept & is_query)
        tl.store(key_place + kept, rest, mask=is_kept & is_key)
        tl.store(value_place + kept, rest, mask=is_kept & is_value)
