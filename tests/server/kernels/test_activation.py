"""The gated activation against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from hotgraph_server.kernels.activation import ACTIVATIONS, gated_activation

DEFINITIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(0.0, x),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gate_is_activated_and_multiplied_with_the_rest(activation: str) -> None:
    """The first half of the columns gates the second; the input is left alone."""
    gate_up = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)) * 3
    before = gate_up.clone()
    expected = [
        [DEFINITIONS[activation](gate) * up for gate, up in zip(row[:5], row[5:], strict=True)]
        for row in gate_up.tolist()
    ]
    torch.testing.assert_close(gated_activation(gate_up, activation), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert torch.equal(gate_up, before)


def test_every_activation_has_a_definition_here() -> None:
    """An activation that is added gets its test."""
    assert set(ACTIVATIONS) == set(DEFINITIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_result_may_go_into_a_tensor(activation: str) -> None:
    """With `out` it takes the result and is returned; the input is left alone."""
    gate_up = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    before, out = gate_up.clone(), torch.empty(3, 5)
    assert gated_activation(gate_up, activation, out) is out
    assert torch.equal(out, gated_activation(gate_up, activation))
    assert torch.equal(gate_up, before)
