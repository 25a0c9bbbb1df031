"""Matrix products in every form a weight is held in, against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotgraph_server.models.weights import CpuLinear, DenseLinear, Linear, PackedLinear, can_pack, make_linear

CPU = torch.device("cpu")


def product(linear: Linear, x: torch.Tensor, *, scales_input: bool) -> torch.Tensor:
    """The true product, with the scale applied where the form wants it."""
    return linear(x * linear.scale) if scales_input else linear(x) * linear.scale


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    input_size=st.integers(1, 70),
    has_bias=st.booleans(),
    scales_input=st.booleans(),
    is_rounded=st.booleans(),
    magnitude=st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_every_form_gives_the_product(
    num_tokens: int,
    sizes: list[int],
    input_size: int,
    has_bias: bool,
    scales_input: bool,
    is_rounded: bool,
    magnitude: float,
    seed: int,
) -> None:
    """Packed or not, fused or not, with or without bias, at every batch size and size of weights."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, input_size, generator=generator) * magnitude for size in sizes]
    if is_rounded:
        parts = [part.bfloat16().float() for part in parts]
    biases = [torch.randn(size, generator=generator) * magnitude for size in sizes] if has_bias else []
    x = torch.randn(num_tokens, input_size, generator=generator)
    linear = make_linear(parts, biases, dtype=torch.float32, device=CPU, scales_input=scales_input)
    expected = x.double() @ torch.cat(parts).double().t() + (torch.cat(biases).double() if biases else 0)
    result = product(linear, x, scales_input=scales_input)
    torch.testing.assert_close(result.double(), expected, atol=1e-5 * magnitude, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 4, 30])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("form", ["dense", "packed", "whole"])
def test_the_product_may_go_into_a_tensor(form: str, has_bias: bool, num_tokens: int, dtype: torch.dtype) -> None:
    """With `out` every form writes there what it gives without, and returns it."""
    generator = torch.Generator().manual_seed(num_tokens)
    weight, bias = torch.randn(17, 33, generator=generator), torch.randn(17, generator=generator)
    x = torch.randn(num_tokens, 33, generator=generator).to(dtype)
    linear: Linear
    if form == "dense":
        linear = DenseLinear(weight.to(dtype), bias.to(dtype) if has_bias else None)
    else:
        parts = [weight.bfloat16() if form == "packed" else weight]
        linear = make_linear(parts, [bias] if has_bias else [], dtype=dtype, device=CPU, scales_input=True)
    out = torch.full((num_tokens, 17), torch.nan, dtype=dtype)
    assert linear(x, out) is out
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out, linear(x), atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not can_pack(), reason="this machine's torch cannot pack")
def test_only_weights_that_lose_nothing_are_packed() -> None:
    """bfloat16 and float16 checkpoints pack; weights with more bits, NaN or infinity do not; zeros do."""
    wide = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def form(*parts: torch.Tensor) -> type[Linear]:
        return type(make_linear(parts, [], dtype=torch.float32, device=CPU, scales_input=True))

    assert form(wide.bfloat16()) is PackedLinear
    assert form(wide.half().float()) is PackedLinear
    assert form(torch.zeros(4, 4)) is PackedLinear
    assert form(wide) is not PackedLinear
    assert form(wide.bfloat16(), wide) is not PackedLinear
    assert form(torch.full((4, 4), torch.nan)) is not PackedLinear
    assert form(torch.full((4, 4), torch.inf)) is not PackedLinear


@pytest.mark.skipif(not can_pack(), reason="this machine's torch cannot pack")
def test_packed_weights_are_the_weights() -> None:
    """Multiplying the unit vectors gives back every bit of a bfloat16 matrix, the smallest numbers too."""
    weight = (
        torch.randn(40, 30, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-20, 20)[:, None] / 1e6
    ).bfloat16()
    weight = torch.where(weight.abs() < weight.abs().max() * 2**-30, 0, weight)
    linear = make_linear([weight], [], dtype=torch.float32, device=CPU, scales_input=False)
    assert isinstance(linear, PackedLinear)
    assert torch.equal(product(linear, torch.eye(30), scales_input=False).t(), weight.float())


def test_other_dtypes_are_held_as_they_are() -> None:
    """float16 and bfloat16 computations use their own weights."""
    linear = make_linear([torch.ones(3, 2)], [torch.ones(3)], dtype=torch.bfloat16, device=CPU, scales_input=True)
    assert type(linear) is DenseLinear
    assert linear(torch.ones(1, 2, dtype=torch.bfloat16)).tolist() == [[3.0, 3.0, 3.0]]


def test_shared_weights_take_no_room_of_their_own() -> None:
    """A tied head that is not packed uses the embedding's memory, and says so."""
    embedding = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    linear = make_linear([embedding], [], dtype=torch.float32, device=CPU, scales_input=True, shares=True)
    assert type(linear) in {CpuLinear, DenseLinear}
    assert linear.num_bytes == 0
    before = linear(torch.ones(1, 8)).clone()
    embedding.mul_(2)
    torch.testing.assert_close(linear(torch.ones(1, 8)), before * 2)
