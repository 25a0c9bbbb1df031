"""Each Triton kernel against the plain torch beside it: the same checks in Triton's interpreter and on a GPU.

A check draws fresh inputs on the CPU, runs the reference there and the kernel on `device`, and compares all that either writes.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from hotgraph_server.kernels.activation import gated_activation, gated_activation_triton
from hotgraph_server.kernels.norm import add_rms_norm, add_rms_norm_triton, rms_norm, rms_norm_triton
from hotgraph_server.kernels.prepare import prepare_step, prepare_step_triton
from hotgraph_server.kernels.rope import RopePlan, rotary_table
from hotgraph_server.kernels.rope_kv import rope_and_write_kv, rope_and_write_kv_triton
from tests.server.kernels.prepare_steps import BLOCK_SIZE, random_step

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HIDDEN_SIZES = (576, 80, 1, 5000)
HEADS: dict[str, tuple[int, int, int, int, bool]] = {
    "many heads": (32, 32, 128, 128, False),
    "grouped": (9, 3, 64, 64, False),
    "normed": (16, 8, 128, 128, True),
    "head size no power of two": (4, 4, 80, 80, True),
    "partly turned": (6, 2, 24, 18, False),
    "partly turned and normed": (3, 1, 96, 72, True),
    "one pair": (1, 1, 2, 2, False),
}
"""Query heads, KV heads, size of a head, elements of it that are turned, whether queries and keys are normed."""

# After sums in another order a rounding to 16 bits may go the other way, rarely; then results differ by a last place or two.
_TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_close(found: torch.Tensor, expected: torch.Tensor, *, different_share: float = 0.02) -> None:
    """Equal but for rounding: all numbers nearly, and in 16 bits all but `different_share` of them to the bit."""
    tolerance = _TOLERANCES[expected.dtype]
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)
    if expected.dtype != torch.float32:
        num_different = int((found.cpu() != expected).sum())
        assert num_different <= 1 + different_share * expected.numel()


def check_rms_norm(size: int, dtype: torch.dtype, device: torch.device, *, num_tokens: int, seed: int) -> None:
    """A new tensor and one that is given, from x that is contiguous or not."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(num_tokens, 2, size, generator=generator) * 3).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    head_weight = torch.randn(2, size, generator=generator).to(dtype)
    there, weight_there, head_weight_there = x.to(device), weight.to(device), head_weight.to(device)
    assert_close(rms_norm_triton(there, weight_there, 1e-5), rms_norm(x, weight, 1e-5))
    assert_close(rms_norm_triton(there, head_weight_there, 1e-5), rms_norm(x, head_weight, 1e-5))
    out = torch.full((num_tokens, size), torch.nan, dtype=dtype, device=device)
    assert rms_norm_triton(there[:, 1], weight_there, 1e-5, out) is out
    assert_close(out, rms_norm(x[:, 1], weight, 1e-5))
    assert torch.equal(there.cpu(), x)


def check_add_rms_norm(size: int, dtype: torch.dtype, device: torch.device, *, num_tokens: int, seed: int) -> None:
    """The sum in place, bit for bit, and its norm."""
    generator = torch.Generator().manual_seed(seed)
    residual = (torch.randn(num_tokens, size, generator=generator) * 3).to(dtype)
    update, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((num_tokens, size), (size,)))
    for scale in (1.0, 0.25):
        residual_there, out = residual.to(device, copy=True), torch.full_like(residual, torch.nan).to(device)
        residual_here = residual.clone()
        expected = add_rms_norm(residual_here, update, weight, 1e-6, scale=scale)
        add_rms_norm_triton(residual_there, update.to(device), weight.to(device), 1e-6, out, scale=scale)
        assert torch.equal(residual_there.cpu(), residual_here)
        assert_close(out, expected)


def check_gated_activation(
    activation: str, size: int, dtype: torch.dtype, device: torch.device, *, num_tokens: int, seed: int
) -> None:
    """Gates of all sizes, from far below zero to far above."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, num_tokens, size, generator=generator)
    gate *= torch.tensor([0.1, 1.0, 6.0, 30.0])[torch.arange(size) % 4]
    gate_up = torch.cat((gate, up), dim=1).to(dtype)
    out = torch.full((num_tokens, size), torch.nan, dtype=dtype, device=device)
    gated_activation_triton(gate_up.to(device), activation, out)
    # Far below zero the plain gelu keeps few digits of a difference to 1.
    assert_close(out, gated_activation(gate_up, activation), different_share=0.2)


def check_rope_and_write_kv(
    heads: tuple[int, int, int, int, bool], dtype: torch.dtype, device: torch.device, *, num_tokens: int, seed: int
) -> None:
    """Turned queries and the whole cache, of which only the tokens' slots change."""
    num_heads, num_kv_heads, head_dim, num_turned, has_norm = heads
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(dtype)
    norm = torch.randn(num_heads + num_kv_heads, head_dim, generator=generator).to(dtype) if has_norm else None
    table = rotary_table(torch.rand(num_turned // 2, generator=generator), 1.2, 700)
    positions = torch.randint(0, 700, (num_tokens,), generator=generator)
    num_blocks = 2 + num_tokens // 2
    kv_indices = torch.randperm(num_blocks * 4, generator=generator)[:num_tokens]
    cache = torch.randn(2, num_blocks, 4, num_kv_heads, head_dim, generator=generator).to(dtype)
    keys, values = cache.clone().unbind()
    keys_there, values_there = cache.to(device, copy=True).unbind()
    expected = rope_and_write_kv(
        qkv,
        RopePlan.for_step(table, positions, dtype),
        kv_indices,
        keys,
        values,
        query_key_norm=norm,
        epsilon=1e-6,
    )
    out = torch.full((num_tokens, num_heads, head_dim), torch.nan, dtype=dtype, device=device)
    rope_and_write_kv_triton(
        qkv.to(device),
        RopePlan.for_step(table.to(device), positions.to(device), dtype),
        kv_indices.to(device),
        keys_there,
        values_there,
        query_key_norm=None if norm is None else norm.to(device),
        epsilon=1e-6,
        out=out,
    )
    assert_close(out, expected)
    assert_close(keys_there, keys)
    assert torch.equal(values_there.cpu(), values)


def check_prepare_step(device: torch.device, *, seed: int, **sizes: Any) -> None:
    """Every number that the model, the sampler and later steps read. `sizes`: see `random_step`."""
    step = random_step(random.Random(seed), **sizes)
    source = step.source_on(device)
    results = {name: tensor.to(device, copy=True) for name, tensor in step.results.items()}
    prepare_step_triton(source, **results, block_size=BLOCK_SIZE)
    prepare_step(step.source, **step.results, block_size=BLOCK_SIZE)
    found = {name: tensor.cpu() for name, tensor in results.items()}
    for name, expected in step.results.items():
        assert torch.equal(found[name], expected), name
    assert torch.equal(source.block_tables.cpu(), step.source.block_tables)
    assert torch.equal(source.parameters.cpu(), step.source.parameters)
    assert torch.equal(source.stages, step.source.stages)
