"""Products for few rows against their plain definition: the same checks in Triton's interpreter and on a GPU.

A check draws fresh inputs on `device`, runs the kernels there, and compares with the definition in float64 as well as with the
reference: the kernels may be as far from the truth as the reference is, give or take the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hotgraph_server.kernels.activation import ACTIVATIONS
from hotgraph_server.kernels.few_rows import few_rows_qkv_reference, few_rows_reference
from hotgraph_server.kernels.few_rows_cuts import DotTuning, SumTuning
from hotgraph_server.kernels.few_rows_triton import few_rows_linear_triton, few_rows_qkv_triton
from hotgraph_server.kernels.rope import RopePlan, rotary_table

DTYPES = (torch.float16, torch.bfloat16)
EPSILON = 1e-5

# Largest distance of a number, of norm of the difference over norm: roundings to 11 and 8 bits, once or three times in a row.
_TOLERANCES = {torch.float16: (8e-3, 1e-3), torch.bfloat16: (6e-2, 8e-3)}


@dataclass(frozen=True)
class Product:
    """What stands around a product of `num_inputs` to `num_outputs`."""

    num_inputs: int
    num_outputs: int
    has_norm: bool = False
    has_bias: bool = False
    activation: str | None = None
    has_residual: bool = False


@dataclass(frozen=True)
class Inputs:
    """Arguments of `few_rows_linear` on one device."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: torch.Tensor | None
    residual: torch.Tensor | None


def draw(product: Product, num_rows: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Numbers of a layer's size: outputs are about 1, x has a few large columns and its norm is small there."""
    generator = torch.Generator(device).manual_seed(seed)
    columns, rows = product.num_inputs, product.num_outputs * (1 if product.activation is None else 2)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    x, norm = numbers(num_rows, columns), 0.2 + torch.rand(columns, generator=generator, device=device)
    if product.has_norm:
        large = torch.randint(0, columns, (2,), generator=generator, device=device)
        x[:, large] *= 30
        norm[large] *= 0.05
    return Inputs(
        x=x.to(dtype),
        weight=(numbers(rows, columns) * columns**-0.5).to(dtype),
        bias=numbers(rows).to(dtype) if product.has_bias else None,
        norm=norm.to(dtype) if product.has_norm else None,
        residual=numbers(num_rows, product.num_outputs).to(dtype) if product.has_residual else None,
    )


def exact(inputs: Inputs, activation: str | None) -> torch.Tensor:
    """The definition without rounding, in float64."""
    x = inputs.x.double()
    if inputs.norm is not None:
        x = x * (x.square().mean(1, keepdim=True) + EPSILON).rsqrt() * inputs.norm.double()
    product = x @ inputs.weight.double().t()
    if inputs.bias is not None:
        product += inputs.bias.double()
    if activation is not None:
        gate, up = product.chunk(2, dim=1)
        product = ACTIVATIONS[activation](gate) * up
    return product if inputs.residual is None else product + inputs.residual.double()


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Every number, and all together more closely."""
    largest, relative = _TOLERANCES[dtype]
    found, expected = found.double().cpu(), expected.double().cpu()
    torch.testing.assert_close(found, expected, rtol=largest, atol=largest)
    assert (found - expected).norm() <= relative * expected.norm()


def check_product(
    product: Product,
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int,
    tuning: SumTuning | DotTuning | None = None,
    pdl: bool = False,
) -> None:
    """The result is that of the definition, everything is written, and of what is given only the residual changes."""
    inputs = draw(product, num_rows, dtype, device, seed)
    before = inputs.x.clone(), inputs.weight.clone()
    # One row too many, which must stay as it is: kernels of eight rows serve fewer.
    room = torch.full((num_rows + 1, product.num_outputs), 7.0, dtype=dtype, device=device)
    out = room[:num_rows]
    out.copy_(torch.tensor(torch.nan) if inputs.residual is None else inputs.residual)
    result = few_rows_linear_triton(
        inputs.x,
        inputs.weight,
        out,
        bias=inputs.bias,
        norm=inputs.norm,
        epsilon=EPSILON,
        normed=torch.full_like(inputs.x, torch.nan),
        activation=product.activation,
        residual=None if inputs.residual is None else out,
        tuning=tuning,
        pdl=pdl,
    )
    assert result is out
    assert torch.equal(room[num_rows], torch.full_like(room[num_rows], 7.0))
    assert_near(out, exact(inputs, product.activation), dtype)
    reference = few_rows_reference(
        inputs.x,
        inputs.weight,
        bias=inputs.bias,
        norm=inputs.norm,
        epsilon=EPSILON,
        activation=product.activation,
        residual=inputs.residual,
    )
    assert_near(out, reference, dtype)
    assert torch.equal(inputs.x, before[0])
    assert torch.equal(inputs.weight, before[1])


def check_rows_alone(product: Product, num_rows: int, dtype: torch.dtype, device: torch.device, *, seed: int) -> None:
    """Each row's result stays to the bit when the other rows change, and from one launch to the next."""
    inputs = draw(product, num_rows, dtype, device, seed)
    others = draw(product, num_rows, dtype, device, seed + 1)

    def run(x: torch.Tensor) -> torch.Tensor:
        return few_rows_linear_triton(
            x, inputs.weight, norm=inputs.norm, epsilon=EPSILON, activation=product.activation, bias=inputs.bias
        )

    whole = run(inputs.x)
    assert torch.equal(run(inputs.x), whole)
    for row in {0, num_rows - 1}:
        mixed = others.x.clone()
        mixed[row] = inputs.x[row]
        assert torch.equal(run(mixed)[row], whole[row])


def check_qkv(
    heads: tuple[int, int, int],
    num_inputs: int,
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    has_bias: bool,
    seed: int,
    pdl: bool = False,
) -> None:
    """Turned queries and the whole cache, of which only the tokens' slots change.

    heads: query heads, KV heads, elements of each.
    """
    num_heads, num_kv_heads, head_dim = heads
    product = Product(num_inputs, (num_heads + 2 * num_kv_heads) * head_dim, has_norm=True, has_bias=has_bias)
    inputs = draw(product, num_rows, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed)
    table = rotary_table(torch.rand(head_dim // 2, generator=generator), 1.2, 700).to(device)
    rope = RopePlan.for_step(table, torch.randint(0, 700, (num_rows,), generator=generator).to(device), dtype)
    num_blocks = 2 + num_rows // 2
    kv_indices = torch.randperm(num_blocks * 4, generator=generator)[:num_rows].to(device)
    before = torch.randn(2, num_blocks, 4, num_kv_heads, head_dim, generator=generator).to(device, dtype)
    cache, expected_cache = before.clone(), before.clone()
    expected = few_rows_qkv_reference(
        inputs.x,
        inputs.weight,
        rope,
        kv_indices,
        expected_cache[0],
        expected_cache[1],
        bias=inputs.bias,
        norm=inputs.norm,
        epsilon=EPSILON,
    )
    room = torch.full((num_rows + 1, num_heads, head_dim), 7.0, dtype=dtype, device=device)
    room[:num_rows] = torch.nan
    few_rows_qkv_triton(
        inputs.x,
        inputs.weight,
        rope,
        kv_indices,
        cache[0],
        cache[1],
        room[:num_rows],
        bias=inputs.bias,
        norm=inputs.norm,
        epsilon=EPSILON,
        normed=torch.full_like(inputs.x, torch.nan),
        pdl=pdl,
    )
    assert torch.equal(room[num_rows], torch.full_like(room[num_rows], 7.0))
    assert_near(room[:num_rows], expected, dtype)
    is_written = torch.zeros(num_blocks * 4, dtype=torch.bool, device=device)
    is_written[kv_indices] = True
    slots, expected_slots, slots_before = (tensor.flatten(1, 2) for tensor in (cache, expected_cache, before))
    assert torch.equal(slots[:, ~is_written], slots_before[:, ~is_written])
    for part in range(2):
        assert_near(slots[part, is_written], expected_slots[part, is_written], dtype)
