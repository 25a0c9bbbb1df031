"""Root-mean-square normalisation against its definition."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.kernels.norm import add_rms_norm, rms_norm


@pytest.mark.parametrize("shape", [(1, 576), (7, 33), (5, 3, 16), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every row is divided by the root of its mean square, then weighted."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype) * 3
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    result = rms_norm(x, weight, 1e-5)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


def test_the_weight_may_differ_from_head_to_head() -> None:
    """A weight for each head is applied to its head."""
    x = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1))
    weight = torch.arange(48.0).view(3, 16)
    for head in range(3):
        torch.testing.assert_close(rms_norm(x, weight, 1e-6)[:, head], rms_norm(x[:, head], weight[head], 1e-6))


def test_zeros_stay_zeros() -> None:
    """epsilon keeps a row of zeros finite, as padding rows may be."""
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


def test_the_input_is_left_alone() -> None:
    """The result is a new tensor."""
    x = torch.ones(2, 8)
    rms_norm(x, torch.full((8,), 5.0), 1e-6)
    assert torch.equal(x, torch.ones(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sum_is_rounded_before_it_is_normed(dtype: torch.dtype) -> None:
    """The residual takes the scaled update, in the dtype; the norm is that of what it then holds."""
    generator = torch.Generator().manual_seed(2)
    residual, update = torch.randn(2, 5, 33, generator=generator).to(dtype)
    weight = torch.randn(33, generator=generator).to(dtype)
    expected = (residual.double() + 0.25 * update.double()).to(dtype)
    out = torch.empty_like(residual)
    assert add_rms_norm(residual, update, weight, 1e-5, out, scale=0.25) is out
    torch.testing.assert_close(residual, expected)
    assert torch.equal(out, rms_norm(residual, weight, 1e-5))


def test_the_norm_may_go_into_a_tensor() -> None:
    """With `out` it takes the result and is returned; without, the result is new."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    out = torch.empty(3, 8)
    assert rms_norm(x, torch.ones(8), 1e-6, out) is out
    assert torch.equal(out, rms_norm(x, torch.ones(8), 1e-6))
