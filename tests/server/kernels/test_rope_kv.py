"""Turning and caching in one call against norm, rope and write one by one, with heads taken apart by hand."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.kernels.norm import rms_norm
from hotgraph_server.kernels.rope import RopePlan, apply_rope, rotary_factors, rotary_table
from hotgraph_server.kernels.rope_kv import rope_and_write_kv

HEAD_DIM = 6
NUM_HEADS, NUM_KV_HEADS = 4, 2
EPSILON = 1e-5


@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("has_out", [False, True], ids=["new", "into a tensor"])
def test_each_head_is_treated_as_its_kind(has_norm: bool, has_out: bool) -> None:
    """Queries come back turned; keys are cached turned, and values as they are; with a norm, each head has its own weights."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, heads, HEAD_DIM, generator=generator) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    query, key, value = parts
    qkv = torch.cat([part.flatten(1) for part in parts], dim=1)
    norm = torch.randn(NUM_HEADS + NUM_KV_HEADS, HEAD_DIM, generator=generator) if has_norm else None
    table = rotary_table(torch.tensor([1.0, 0.3]), 1.1, 50)
    positions, kv_indices = torch.tensor([4, 0, 49]), torch.tensor([13, 4, 19])
    keys, values = torch.full((5, 4, NUM_KV_HEADS, HEAD_DIM), -1.0), torch.full((5, 4, NUM_KV_HEADS, HEAD_DIM), -2.0)
    out = torch.empty(3, NUM_HEADS, HEAD_DIM) if has_out else None
    result = rope_and_write_kv(
        qkv,
        RopePlan.for_step(table, positions, torch.float32),
        kv_indices,
        keys,
        values,
        query_key_norm=norm,
        epsilon=EPSILON,
        out=out,
    )
    if norm is not None:
        query, key = rms_norm(query, norm[:NUM_HEADS], EPSILON), rms_norm(key, norm[NUM_HEADS:], EPSILON)
    factors = rotary_factors(table, positions, torch.float32)
    assert torch.equal(result, apply_rope(query, factors))
    assert out is None or result is out
    expected_keys, expected_values = torch.full_like(keys, -1.0), torch.full_like(values, -2.0)
    for token, slot in enumerate(kv_indices.tolist()):
        expected_keys[slot // 4, slot % 4] = apply_rope(key, factors)[token]
        expected_values[slot // 4, slot % 4] = value[token]
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
