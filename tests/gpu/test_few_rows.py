"""Products for few rows on an NVIDIA GPU: right at the sizes of real models, alone and in a chain, and faster than torch's."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.kernels.few_rows import few_rows_linear
from tests.gpu.few_rows_times import measure
from tests.server.kernels.few_rows_checks import DTYPES, Product, check_product, check_qkv, check_rows_alone

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")

# Hidden and intermediate size, and outputs of the QKV product.
MODELS = {
    "Llama-2-7B": (4096, 11008, 3 * 4096),
    "Llama-3-8B": (4096, 14336, 6144),
    "SmolLM2-135M": (576, 1536, 960),
}
ROWS = (1, 2, 3, 5, 8, 9, 16)


def products(model: str) -> list[Product]:
    hidden, intermediate, qkv = MODELS[model]
    return [
        Product(hidden, qkv, has_norm=True),
        Product(hidden, hidden, has_residual=True),
        Product(hidden, intermediate, has_norm=True, activation="silu"),
        Product(intermediate, hidden, has_residual=True),
    ]


@pytest.mark.parametrize("model", MODELS)
def test_products(model: str) -> None:
    """Every product of a layer is that of the definition, for one row to 16, whatever was queued before."""
    for index, product in enumerate(products(model)):
        for num_rows in ROWS:
            dtype = DTYPES[index // 2]
            check_product(product, num_rows, dtype, CUDA, seed=index * 100 + num_rows, pdl=True)


@pytest.mark.parametrize("heads", [(32, 32, 128), (32, 8, 128), (9, 3, 64)], ids=MODELS)
def test_queries_keys_and_values(heads: tuple[int, int, int]) -> None:
    """Turned queries, and the whole cache, are those of the definition."""
    hidden = heads[0] * heads[2]
    for num_rows in ROWS:
        check_qkv(heads, hidden, num_rows, torch.float16, CUDA, has_bias=num_rows == 3, seed=num_rows, pdl=True)


@pytest.mark.parametrize("num_rows", [1, 2, 4, 16])
def test_odd_sizes(num_rows: int) -> None:
    """Sizes that no block divides, and an output of one number."""
    for product in (
        Product(80, 1),
        Product(4112, 301, has_norm=True),
        Product(720, 99, activation="gelu", has_bias=True),
    ):
        check_product(product, num_rows, torch.float16, CUDA, seed=num_rows, pdl=True)


def test_rows_do_not_meet() -> None:
    """What a row gives depends neither on its neighbours nor on the launch."""
    for num_rows in (2, 7, 13):
        check_rows_alone(Product(4096, 1000, has_norm=True), num_rows, torch.float16, CUDA, seed=num_rows)


@pytest.mark.parametrize("num_rows", [1, 2, 6, 16])
def test_a_chain_with_pdl_gives_the_bits_of_one_without(num_rows: int) -> None:
    """Layers in a graph whose kernels overlap give, at each of many replays, what the same kernels give one after the other."""
    hidden, intermediate, num_layers = 1024, 2816, 6
    generator = torch.Generator(CUDA).manual_seed(num_rows)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=CUDA, dtype=torch.float16).mul_(size[-1] ** -0.5)

    layers = [
        (draw(hidden, hidden), draw(hidden, hidden), draw(2 * intermediate, hidden), draw(hidden, intermediate))
        for _ in range(num_layers)
    ]
    norm = torch.rand(hidden, generator=generator, device=CUDA).half()
    start = torch.randn(num_rows, hidden, generator=generator, device=CUDA).half()
    residual, first, normed = (torch.empty_like(start) for _ in range(3))
    gated = start.new_empty(num_rows, intermediate)

    def forward(*, pdl: bool) -> None:
        residual.copy_(start)
        for qkv, o, gate_up, down in layers:
            few_rows_linear(residual, qkv, first, norm=norm, epsilon=1e-5, normed=normed, pdl=pdl)
            few_rows_linear(first, o, residual, residual=residual, pdl=pdl)
            few_rows_linear(
                residual, gate_up, gated, norm=norm, epsilon=1e-5, normed=normed, activation="silu", pdl=pdl
            )
            few_rows_linear(gated, down, residual, residual=residual, pdl=pdl)

    forward(pdl=False)
    expected = residual.clone()
    forward(pdl=True)
    assert torch.equal(residual, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(pdl=True)
    for _ in range(50):
        residual.fill_(torch.nan)
        graph.replay()
        assert torch.equal(residual, expected)


def test_no_numbers_are_hidden() -> None:
    """Not a number in, not a number out, in that row alone."""
    for num_rows in (2, 4):
        x = torch.ones(num_rows, 4096, dtype=torch.float16, device=CUDA)
        x[1, 77] = torch.nan
        weight = torch.ones(64, 4096, dtype=torch.float16, device=CUDA)
        for activation in (None, "silu"):
            result = few_rows_linear(x, weight, norm=x[0], epsilon=1e-5, activation=activation)
            assert result[1].isnan().all()
            assert not result[0].isnan().any()


def test_times() -> None:
    """Prints microseconds of each product and of layers in a chain; at few rows the chain beats torch and separate kernels."""
    result = measure([1, 2, 4, 8, 16], sweeps=True)
    for chain in result["chains"]:
        if chain["rows"] <= 8:
            assert chain["rule with PDL"] < chain["torch and separate kernels"]
