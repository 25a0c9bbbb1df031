"""Tests of epilogue.py: what a kernel is told of the way behind its product."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.kernels.epilogue import heads_epilogue, linear_epilogue, num_outputs_of
from hotgraph_server.kernels.rope import RopePlan


def test_both_name_the_same_arguments_in_the_same_order() -> None:
    """One kernel takes either: what it is launched with again is found by the order of names."""
    indices = torch.zeros(3, dtype=torch.int64)
    cache = torch.zeros(2, 4, 16, 2, 8)
    heads = heads_epilogue(RopePlan(torch.ones(10, 8), indices, None), indices, *cache)
    linear = linear_epilogue(torch.zeros(6, 4), None, None)
    assert list(heads.tensors) == list(linear.tensors)
    assert list(heads.constants) == list(linear.constants)
    assert list(heads.constants.values()) == [None, 4, 2, 8]
    assert list(linear.constants.values()) == [None, 0, 0, 0]


def test_a_gated_product_has_pairs() -> None:
    """Gates and what they are for are half of the weight's rows apart; both names of an activation are one kernel."""
    weight = torch.zeros(6, 4)
    assert num_outputs_of(weight, "silu") == 3
    assert linear_epilogue(weight, "swish", None) == linear_epilogue(weight, "silu", None)
    assert linear_epilogue(weight, "silu", None).constants["DISTANCE"] == 3


def test_heads_are_turned_whole_in_a_contiguous_cache() -> None:
    """Anything else is our own mistake."""
    indices = torch.zeros(3, dtype=torch.int64)
    keys, values = torch.zeros(2, 4, 16, 2, 8)
    with pytest.raises(AssertionError, match="turned whole"):
        heads_epilogue(RopePlan(torch.ones(10, 6), indices, None), indices, keys, values)
    with pytest.raises(AssertionError, match="contiguous"):
        heads_epilogue(RopePlan(torch.ones(10, 8), indices, None), indices, keys, values.transpose(0, 1))
