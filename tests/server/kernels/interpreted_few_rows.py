"""Products for few rows in Triton's interpreter, on the CPU. `test_few_rows_triton.py` runs it in a process of its own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton.language as tl  # type: ignore[import-untyped]  # it comes without types
from triton.runtime import interpreter  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.few_rows_cuts import DotTuning, SumTuning
from hotgraph_server.kernels.few_rows_triton import few_rows_linear_triton, few_rows_qkv_triton
from hotgraph_server.models import few_rows_layers
from tests.server.kernels.few_rows_checks import DTYPES, Product, check_product, check_qkv, check_rows_alone
from tests.server.models import test_few_rows_layers
from tests.server.models.driver import Driver, random_tokens, reference_logits

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.6 cuts float32 off where it makes bfloat16 of it, and multiplies its bits as integers."""
    cut_off = interpreter._convert_float
    multiply = interpreter.InterpreterBuilder.create_dot

    def convert(data: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> Any:
        if from_dtype == tl.float32 and to_dtype == tl.bfloat16:
            return torch.tensor(data).bfloat16().view(torch.uint16).numpy()
        return cut_off(data, from_dtype, to_dtype, rounding_mode)

    def dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle(cut_off(x.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)
                for x in (a, b)
            )
        return multiply(builder, a, b, *others)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


PRODUCTS: dict[str, Product] = {
    "normed": Product(80, 34, has_norm=True),
    "normed with bias": Product(208, 37, has_norm=True, has_bias=True),
    "onto the residual": Product(336, 40, has_residual=True),
    "onto the residual with bias": Product(96, 19, has_residual=True, has_bias=True),
    "gated": Product(144, 27, has_norm=True, activation="silu"),
    "gated with bias": Product(64, 16, has_norm=True, activation="gelu", has_bias=True),
    "plain": Product(16, 5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products(product: Product, dtype: torch.dtype) -> None:
    """Every product of a layer, at one row, two, up to 8 and up to 16."""
    for num_rows in (1, 2, 5, 9):
        check_product(product, num_rows, dtype, CPU, seed=num_rows)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activations(activation: str) -> None:
    """Each is that of the definition, in the kernels of both kinds."""
    for num_rows in (2, 5):
        check_product(Product(48, 10, activation=activation), num_rows, torch.float16, CPU, seed=num_rows)


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed: int) -> None:
    """Any size, cut up in any way: more tiles than are in flight and fewer, tiles and programs that end beyond the weight."""
    rng = random.Random(seed)
    product = Product(
        num_inputs=16 * rng.randint(1, 40),
        num_outputs=rng.randint(1, 50),
        has_norm=rng.random() < 0.5,
        has_bias=rng.random() < 0.5,
        activation=rng.choice([None, "silu"]),
        has_residual=rng.random() < 0.5,
    )
    sums = SumTuning(
        block_rows=rng.choice([2, 4, 8]),
        tile=rng.choice([32, 64, 256]),
        num_warps=4,
        ahead=rng.randint(1, 3),
        triggers_late=True,
    )
    ahead = rng.randint(1, 4)
    dots = DotTuning(
        block_rows=rng.choice([16, 32]),
        parts=rng.choice([1, 2, 4]),
        num_warps=rng.choice([1, 2, 4]),
        ahead=ahead,
        tokens_ahead=rng.randint(1, ahead),
    )
    check_product(product, rng.randint(1, 2), torch.float16, CPU, seed=seed, tuning=sums)
    check_product(product, rng.randint(1, 16), torch.float16, CPU, seed=seed, tuning=dots)


def test_rows_do_not_meet() -> None:
    """What a row gives does not depend on its neighbours."""
    for num_rows in (2, 13):
        check_rows_alone(Product(96, 21, has_norm=True), num_rows, torch.float16, CPU, seed=num_rows)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((2, 2, 8), torch.float16), ((4, 2, 10), torch.bfloat16), ((3, 1, 12), torch.float16)],
    ids=["MHA", "GQA", "MQA"],
)
def test_queries_keys_and_values(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Heads of every kind are normed, multiplied, turned and written to the cache."""
    for num_rows in (1, 2, 11):
        check_qkv(heads, 48, num_rows, dtype, CPU, has_bias=num_rows == 2, seed=num_rows)


@pytest.mark.parametrize("name", ["llama with biases and gelu", "qwen3"])
def test_a_decoder_made_of_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the logits of transformers: what it hands the kernels is laid out as they take it."""
    monkeypatch.setattr(few_rows_layers, "few_rows_linear", few_rows_linear_triton)
    monkeypatch.setattr(few_rows_layers, "few_rows_qkv", few_rows_qkv_triton)
    model = test_few_rows_layers.decoder(name, torch.float16)
    texts = {key: random_tokens(9, model.vocabulary_size, seed) for seed, key in enumerate("ab")}
    expected = {key: reference_logits(test_few_rows_layers.source(name), text) for key, text in texts.items()}
    driver = Driver(model, arena=test_few_rows_layers.arena_for(model, name))
    position = dict.fromkeys(texts, 0)
    for step in ({"a": 3}, {"a": 1, "b": 1}, {"b": 1}):
        chunks = {key: texts[key][position[key] : position[key] + count] for key, count in step.items()}
        for key, logits in driver.step(chunks).items():
            position[key] += step[key]
            wanted = expected[key][position[key] - 1]
            assert (logits - wanted).norm() < 1e-2 * wanted.norm()
