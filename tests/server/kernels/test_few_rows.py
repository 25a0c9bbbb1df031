"""Products for few rows on the CPU: they are the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hotgraph_server.kernels.few_rows import can_fuse_rope, few_rows_linear, few_rows_qkv, few_rows_reference
from hotgraph_server.kernels.rope import RopePlan, rotary_table
from hotgraph_server.kernels.rope_kv import rope_and_write_kv
from tests.server.kernels.few_rows_checks import Product, assert_near, draw, exact

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_rows", [1, 2, 16])
def test_on_the_cpu_it_is_the_definition(num_rows: int) -> None:
    """In place onto the residual, into a given tensor and into a new one: the definition, which is near the exact result."""
    product = Product(336, 45, has_norm=True, has_bias=True, activation="silu", has_residual=True)
    inputs = draw(product, num_rows, torch.float16, CPU, seed=num_rows)
    options: dict[str, Any] = {"bias": inputs.bias, "norm": inputs.norm, "epsilon": 1e-5, "activation": "silu"}
    expected = few_rows_reference(inputs.x, inputs.weight, residual=inputs.residual, **options)
    assert_near(expected, exact(inputs, "silu"), torch.float16)
    assert inputs.residual is not None
    assert torch.equal(few_rows_linear(inputs.x, inputs.weight, residual=inputs.residual, **options), expected)
    out = inputs.residual.clone()
    assert few_rows_linear(inputs.x, inputs.weight, out, residual=out, **options) is out
    assert torch.equal(out, expected)


def test_queries_keys_and_values_on_the_cpu() -> None:
    """The product and then rope and the write to the cache; only heads that are turned whole and not normed are fused."""
    inputs = draw(Product(48, 8 * 12, has_norm=True), 3, torch.float16, CPU, seed=1)
    rope = RopePlan.for_step(rotary_table(torch.rand(6), 1.0, 30), torch.tensor([4, 0, 29]), torch.float16)
    indices, caches = torch.tensor([5, 0, 3]), torch.randn(2, 2, 2, 4, 2, 12).half()
    options: dict[str, Any] = {"norm": inputs.norm, "epsilon": 1e-5}
    qkv = few_rows_reference(inputs.x, inputs.weight, **options)
    expected = rope_and_write_kv(qkv, rope, indices, *caches[0].unbind())
    caches[1] = caches[0]
    out = torch.empty_like(expected)
    caches[1, :, 0, 0] = torch.nan  # a slot that is written
    keys, values = caches[1].unbind()
    assert few_rows_qkv(inputs.x, inputs.weight, rope, indices, keys, values, out, **options) is out
    assert torch.equal(out, expected)
    assert torch.equal(caches[1], caches[0])
    assert can_fuse_rope(128, 128, has_head_norm=False)
    assert not can_fuse_rope(128, 64, has_head_norm=False)
    assert not can_fuse_rope(128, 128, has_head_norm=True)
