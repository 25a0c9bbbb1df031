"""Batch-invariant layers on the CPU, where each kernel is its plain definition: what goes through them, and who is refused."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.kernels.attention import paged_attention
from hotgraph_server.models import invariant_layers, layers, tile_rows_layers
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.invariant_layers import InvariantLayers, InvariantLinear, ShortInvariantLayers
from hotgraph_server.models.weights import DenseLinear
from tests.server.models.driver import Driver, random_tokens
from tests.server.models.test_few_rows_layers import CONFIGS, CPU, TOLERANCES, decoder, recorded, source

STEPS: list[dict[str, int]] = [
    {"a": 1},
    {f"row {row}": 1 + row for row in range(11)},
    dict.fromkeys(map("row {}".format, range(11)), 1),
    {"a": 1, "b": 70},
    {"a": 1, "b": 1, "c": 100},
    {"a": 1, "b": 140},
]


def invariant(name: str, dtype: torch.dtype = torch.float32, *, is_forced: bool = True) -> Decoder:
    return Decoder.from_config(
        deepcopy(source(name).config),
        source(name).state_dict(),
        dtype=dtype,
        device=CPU,
        fuses_few_rows=True if is_forced else None,
        batch_invariant=True,
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_plain_layers(name: str, dtype: torch.dtype) -> None:
    """Lone rows, many, prompts of more tokens than a program has room for, and mixed steps give the same logits."""
    drivers = [
        Driver(model, num_padding_tokens=2, num_padding_rows=1)
        for model in (decoder(name, dtype, fuses_few_rows=False), invariant(name, dtype))
    ]
    for seed, step in enumerate(STEPS):
        chunks = {key: random_tokens(count, 151, seed=31 * seed + len(key)) for key, count in step.items()}
        expected, found = (driver.step(chunks) for driver in drivers)
        for key in step:
            error = (found[key] - expected[key]).norm() / expected[key].norm()
            assert error <= TOLERANCES[dtype], f"{key} in step {seed}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_product_of_every_step_is_invariant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one token on nothing is multiplied or attended to elsewhere; long steps have products alone."""
    calls: list[tuple[str, object]] = []
    long: list[tuple[str, object]] = []
    recorded(monkeypatch, tile_rows_layers, ["tile_rows_linear", "tile_rows_qkv"], calls)
    recorded(monkeypatch, invariant_layers, ["tile_rows_linear"], long)
    kinds: list[object] = []

    def noted(*arguments: object, is_invariant: bool, **options: object) -> torch.Tensor:
        kinds.append(is_invariant)
        return paged_attention(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "paged_attention", noted)
    monkeypatch.setattr(layers, "has_pdl", lambda device: True)
    model = invariant(name)
    driver = Driver(model)
    num_layers = len(model.kv_layout)
    for num_tokens in (1, 2, 3, 9, 65, 128, 129, 150):
        calls.clear()
        long.clear()
        kinds.clear()
        driver.step({f"{num_tokens}": [3] * num_tokens})
        num_products = 4 * num_layers + 1
        assert (len(calls), len(long)) == ((0, num_products) if num_tokens > 128 else (num_products, 0))
        assert kinds == [True] * num_layers


def test_products_go_to_cublas_where_it_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the numbers of rows that were found, results of its own dtype, and weights without a bias; else never."""
    asked: list[tuple[int, bool]] = []

    def equal_rows(weight: torch.Tensor, max_rows: int, *, was_normed: bool) -> frozenset[int]:
        asked.append((max_rows, was_normed))
        return frozenset({144, 160})

    calls: list[tuple[str, object]] = []
    recorded(monkeypatch, invariant_layers, ["tile_rows_linear"], calls)
    monkeypatch.setattr(invariant_layers, "equal_rows", equal_rows)
    weight, bias = torch.randn(24, 16), torch.randn(24)
    plain, biased = (InvariantLinear(DenseLinear(weight, part), was_normed=True) for part in (None, bias))
    for num_rows, linear, out in (
        (144, plain, None),
        (145, plain, None),
        (144, biased, None),
        (144, plain, torch.empty(144, 24)),
        (144, plain, torch.empty(144, 24, dtype=torch.float64)),
        (160, plain, None),
    ):
        x = torch.randn(num_rows, 16)
        expected = torch.nn.functional.linear(x, weight, linear.bias)
        torch.testing.assert_close(linear(x, out), expected, check_dtype=False)
        assert len(calls) == 1, "not tried yet"
        calls.clear()
        linear.try_out(200)
        is_taken = linear is plain and num_rows != 145 and (out is None or out.dtype == x.dtype)
        torch.testing.assert_close(linear(x, out), expected, check_dtype=False)
        assert len(calls) == (0 if is_taken else 1)
        calls.clear()
        linear._equal_rows = frozenset()
    assert set(asked) == {(200, True)}


def test_models_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU, float32, and weights that the kernel does not know: each is told, and nothing else is run in its place."""
    with pytest.raises(ModelLoadError, match=r"model\.batch_invariant needs an NVIDIA GPU of compute capability 9"):
        invariant("llama", torch.float16, is_forced=False)
    monkeypatch.setattr(invariant_layers, "runs_on", lambda device: True)
    with pytest.raises(ModelLoadError, match=r"needs model\.dtype float16 or bfloat16, not float32"):
        invariant("llama", is_forced=False)
    model = invariant("llama", torch.float16, is_forced=False)
    assert isinstance(model._layers, InvariantLayers)
    assert isinstance(model._tile_rows_layers, ShortInvariantLayers)
    monkeypatch.setattr(invariant_layers, "suits", lambda weight: weight.shape[1] != 80)
    with pytest.raises(ModelLoadError, match="no product for a weight 48x80"):
        invariant("llama", torch.float16, is_forced=False)
