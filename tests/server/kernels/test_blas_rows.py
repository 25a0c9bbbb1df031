"""Where cuBLAS may stand in for the products of one order: it is tried, and what differs is left alone."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.engine.buckets import Buckets
from hotgraph_server.kernels import blas_rows
from hotgraph_server.kernels.blas_rows import MIN_ROWS, equal_rows, rows_to_try


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have found is not known here."""
    monkeypatch.setattr(blas_rows, "_found", {})


@pytest.mark.parametrize("max_tokens", [512, 1024, 2048, 4096, 8192])
def test_it_tries_what_steps_have(max_tokens: int) -> None:
    """Every size of a step's graph above 128 tokens is among the numbers, and none above the largest."""
    tried = rows_to_try(max_tokens)
    buckets = Buckets(num_slots=64, max_step_tokens=max_tokens, max_padding_ratio=1.0)
    sizes = {size for size in buckets._tokens if size >= MIN_ROWS}
    assert len(sizes) >= 10
    assert sizes <= set(tried)
    assert tried == sorted(set(tried))
    assert MIN_ROWS <= tried[0] <= tried[-1] == max_tokens
    assert len(tried) < 100


def test_short_steps_try_nothing() -> None:
    """The kernel that takes one block of tokens does them whole."""
    assert rows_to_try(128) == []
    assert rows_to_try(129) == [129]
    assert rows_to_try(144) == [144]


def test_what_differs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of a result that is one unit off is enough; each size of weight and rows is tried once, on random rows."""
    tried: list[int] = []

    def product(x: torch.Tensor, weight: torch.Tensor, *, was_normed: bool) -> torch.Tensor:
        assert was_normed
        assert x.std() > 0.5
        tried.append(len(x))
        result = torch.mm(x, weight.t())
        if len(x) == 160:
            result[7, 3] = result[7, 3].nextafter(torch.tensor(torch.inf))
        return result

    monkeypatch.setattr(blas_rows, "tile_rows_linear", product)
    weight = torch.randn(24, 32)
    assert equal_rows(weight, 200, was_normed=True) == {144, 176, 192, 200}
    assert tried == [144, 160, 176, 192, 200]
    assert equal_rows(torch.randn(24, 32), 192, was_normed=True) == {144, 176, 192}
    assert equal_rows(weight, 100, was_normed=True) == frozenset()
    assert tried == [144, 160, 176, 192, 200]
    equal_rows(torch.randn(25, 32), 150, was_normed=True)
    assert tried[5:] == [144, 150]
