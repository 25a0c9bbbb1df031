"""Products in one order on an NVIDIA GPU: right at the sizes of real models, alone, and in a chain."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hotgraph_server.kernels.few_rows import few_rows_qkv_reference, few_rows_reference
from hotgraph_server.kernels.rope import RopePlan, rotary_table
from hotgraph_server.kernels.tile_rows import runs_on, tile_rows_linear, tile_rows_qkv
from hotgraph_server.kernels.tile_rows_cuts import TileTuning
from hotgraph_server.kernels.tile_rows_triton import readable_rows, suits, tile_rows_linear_triton, tile_rows_qkv_triton
from tests.gpu.tile_rows_times import measure
from tests.server.kernels.few_rows_checks import DTYPES, EPSILON, Product, assert_near, draw, exact

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")

# Hidden and intermediate size, and outputs of the QKV product.
MODELS = {
    "Llama-2-7B": (4096, 11008, 3 * 4096),
    "Llama-3-8B": (4096, 14336, 6144),
    "SmolLM2-135M": (576, 1536, 960),
}
ROWS = (1, 3, 8, 9, 16, 17, 24, 32, 33, 48, 64)


def products(model: str) -> list[Product]:
    hidden, intermediate, qkv = MODELS[model]
    return [
        Product(hidden, qkv, has_norm=True, has_bias=True),
        Product(hidden, hidden, has_residual=True),
        Product(hidden, intermediate, has_norm=True, activation="silu"),
        Product(intermediate, hidden, has_residual=True),
    ]


def check_product(
    product: Product,
    num_rows: int,
    dtype: torch.dtype,
    *,
    seed: int,
    tuning: TileTuning | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    """The result is that of the definition, everything is written, and of what is given only the residual changes."""
    inputs = draw(product, num_rows, dtype, CUDA, seed)
    assert suits(inputs.weight)
    before = inputs.x.clone(), inputs.weight.clone()
    # One row too many, which must stay as it is: a kernel with room for 32 rows serves fewer.
    room = torch.full((num_rows + 1, product.num_outputs), 7.0, dtype=out_dtype or dtype, device=CUDA)
    out = room[:num_rows]
    out.copy_(torch.tensor(torch.nan) if inputs.residual is None else inputs.residual)
    options: dict[str, Any] = {
        "bias": inputs.bias,
        "norm": inputs.norm,
        "epsilon": EPSILON,
        "activation": product.activation,
    }
    result = tile_rows_linear_triton(
        inputs.x,
        inputs.weight,
        out,
        normed=torch.full_like(inputs.x, torch.nan),
        residual=None if inputs.residual is None else out,
        pdl=True,
        tuning=tuning,
        **options,
    )
    assert result is out
    assert torch.equal(room[num_rows], torch.full_like(room[num_rows], 7.0))
    assert_near(out, exact(inputs, product.activation), dtype)
    assert_near(out, few_rows_reference(inputs.x, inputs.weight, residual=inputs.residual, **options), dtype)
    assert torch.equal(inputs.x, before[0])
    assert torch.equal(inputs.weight, before[1])


def check_qkv(
    heads: tuple[int, int, int],
    num_inputs: int,
    num_rows: int,
    dtype: torch.dtype,
    *,
    seed: int,
    tuning: TileTuning | None = None,
) -> None:
    """Turned queries and the whole cache, of which only the tokens' slots change.

    heads: query heads, KV heads, elements of each.
    """
    num_heads, num_kv_heads, head_dim = heads
    product = Product(num_inputs, (num_heads + 2 * num_kv_heads) * head_dim, has_norm=True, has_bias=seed % 2 == 0)
    inputs = draw(product, num_rows, dtype, CUDA, seed)
    generator = torch.Generator().manual_seed(seed)
    table = rotary_table(torch.rand(head_dim // 2, generator=generator), 1.2, 700).to(CUDA)
    rope = RopePlan.for_step(table, torch.randint(0, 700, (num_rows,), generator=generator).to(CUDA), dtype)
    num_blocks = 2 + num_rows // 2
    kv_indices = torch.randperm(num_blocks * 4, generator=generator)[:num_rows].to(CUDA)
    before = torch.randn(2, num_blocks, 4, num_kv_heads, head_dim, generator=generator).to(CUDA, dtype)
    cache, expected_cache = before.clone(), before.clone()
    options: dict[str, Any] = {"bias": inputs.bias, "norm": inputs.norm, "epsilon": EPSILON}
    expected = few_rows_qkv_reference(
        inputs.x, inputs.weight, rope, kv_indices, expected_cache[0], expected_cache[1], **options
    )
    room = torch.full((num_rows + 1, num_heads, head_dim), 7.0, dtype=dtype, device=CUDA)
    room[:num_rows] = torch.nan
    tile_rows_qkv_triton(
        inputs.x,
        inputs.weight,
        rope,
        kv_indices,
        cache[0],
        cache[1],
        room[:num_rows],
        normed=torch.full_like(inputs.x, torch.nan),
        pdl=True,
        tuning=tuning,
        **options,
    )
    assert torch.equal(room[num_rows], torch.full_like(room[num_rows], 7.0))
    assert_near(room[:num_rows], expected, dtype)
    is_written = torch.zeros(num_blocks * 4, dtype=torch.bool, device=CUDA)
    is_written[kv_indices] = True
    slots, expected_slots, slots_before = (tensor.flatten(1, 2) for tensor in (cache, expected_cache, before))
    assert torch.equal(slots[:, ~is_written], slots_before[:, ~is_written])
    for part in range(2):
        assert_near(slots[part, is_written], expected_slots[part, is_written], dtype)


def test_it_runs_here() -> None:
    """The GPU has the instructions; else nothing below says anything."""
    assert runs_on(CUDA)


@pytest.mark.parametrize("model", MODELS)
def test_products(model: str) -> None:
    """Every product of a layer is that of the definition, whatever was queued before."""
    for index, product in enumerate(products(model)):
        for num_rows in ROWS:
            check_product(product, num_rows, DTYPES[index // 2], seed=index * 100 + num_rows)


@pytest.mark.parametrize(("heads", "hidden"), [((32, 32, 128), 4096), ((32, 8, 128), 4096), ((9, 3, 64), 576)])
def test_queries_keys_and_values(heads: tuple[int, int, int], hidden: int) -> None:
    """Turned queries, and the whole cache, are those of the definition."""
    for num_rows in ROWS:
        check_qkv(heads, hidden, num_rows, DTYPES[num_rows % 2], seed=num_rows)


def test_heads_of_other_sizes() -> None:
    """Heads of which a tile takes a part."""
    check_qkv((6, 2, 96), 576, 20, torch.float16, seed=1)
    check_qkv((5, 1, 32), 320, 11, torch.bfloat16, seed=2)
    check_qkv((2, 1, 256), 512, 40, torch.float16, seed=3)
    check_qkv((8, 2, 128), 4096, 30, torch.float16, seed=4, tuning=TileTuning(64, parts=2, num_stages=4))


def test_odd_sizes() -> None:
    """Sizes that no block divides, an output of one number, fewer inputs than a tile, and one row."""
    for num_rows, product in (
        (9, Product(80, 1)),
        (20, Product(16, 40, has_residual=True)),
        (64, Product(4112, 301, has_norm=True)),
        (31, Product(720, 99, activation="gelu", has_bias=True)),
        (16, Product(1040, 144, activation="relu", has_bias=True, has_residual=True)),
        (33, Product(272, 1000, activation="gelu_pytorch_tanh")),
        (1, Product(720, 128)),
    ):
        check_product(product, num_rows, torch.float16, seed=num_rows)


@pytest.mark.parametrize("num_rows", [16, 32, 64])
def test_logits_are_not_rounded(num_rows: int) -> None:
    """Into float32 the sums go as they are: nearer to the exact result than 16 bits could be."""
    product = Product(4096, 32000, has_norm=False)
    check_product(product, num_rows, torch.bfloat16, seed=1, out_dtype=torch.float32)
    inputs = draw(product, num_rows, torch.bfloat16, CUDA, seed=2)
    out = torch.empty(num_rows, 32000, device=CUDA)
    tile_rows_linear(inputs.x, inputs.weight, out)
    expected = exact(inputs, None)
    assert (out - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(
    ("num_rows", "tuning"),
    [
        (13, TileTuning(16, parts=1, num_stages=5)),
        (32, TileTuning(32, parts=4, num_stages=2)),
        (50, TileTuning(64, parts=1, num_stages=2)),
        (16, TileTuning(64, parts=1, num_stages=9)),
        (61, TileTuning(64, parts=2, num_stages=6)),
        (21, TileTuning(128, parts=1, num_stages=6, num_warps=8)),
        (64, TileTuning(128, parts=1, num_stages=6, num_warps=8)),
        (40, TileTuning(128, parts=2, num_stages=3, num_warps=4, triggers_late=False)),
    ],
    ids=str,
)
def test_every_way_to_cut_it_up(num_rows: int, tuning: TileTuning) -> None:
    """Blocks of all sizes, rings of two stages and of many: the definition."""
    product = Product(2064, 1000, has_residual=True)
    check_product(product, num_rows, torch.float16, seed=num_rows, tuning=tuning)
    if tuning.block_rows > 16:
        product = Product(2064, 500, activation="silu")
        check_product(product, num_rows, torch.bfloat16, seed=num_rows, tuning=tuning)


@pytest.mark.parametrize("num_rows", [9, 32, 50])
def test_rows_do_not_meet(num_rows: int) -> None:
    """What a row gives depends neither on its neighbours nor on the launch, to the bit."""
    for product in (Product(4096, 1000, has_norm=True), Product(4096, 4096)):
        inputs = draw(product, num_rows, torch.float16, CUDA, num_rows)
        others = draw(product, num_rows, torch.float16, CUDA, num_rows + 1)

        def run(
            x: torch.Tensor, product: Product = product, weight: torch.Tensor = inputs.weight, norm: Any = inputs.norm
        ) -> torch.Tensor:
            return tile_rows_linear(x, weight, norm=norm, epsilon=EPSILON, activation=product.activation)

        whole = run(inputs.x)
        for _ in range(20):
            assert torch.equal(run(inputs.x), whole)
        for row in {0, num_rows // 2, num_rows - 1}:
            mixed = others.x.clone()
            mixed[row] = inputs.x[row]
            assert torch.equal(run(mixed)[row], whole[row])


@pytest.mark.parametrize("num_rows", [5, 40, 64, 96, 200])
def test_rows_beyond_x_change_nothing(num_rows: int) -> None:
    """Whether the memory of x goes on, and whatever stands there, the result is the same; nothing but it is written."""
    for product in (Product(4096, 1000, has_norm=False), Product(2064, 500, activation="silu")):
        inputs = draw(product, num_rows, torch.float16, CUDA, num_rows)
        alone = tile_rows_linear(inputs.x, inputs.weight, activation=product.activation)
        assert readable_rows(inputs.x, 256) == num_rows
        for filling in (torch.nan, torch.inf, 1.0):
            room = torch.full((300, product.num_inputs), filling, dtype=torch.float16, device=CUDA)
            room[:num_rows] = inputs.x
            assert readable_rows(room[:num_rows], 256) == 256
            out = torch.full((300, product.num_outputs), 7.0, dtype=torch.float16, device=CUDA)
            tile_rows_linear(room[:num_rows], inputs.weight, out[:num_rows], activation=product.activation)
            assert torch.equal(out[:num_rows], alone)
            assert (out[num_rows:] == 7.0).all()


@pytest.mark.parametrize("num_rows", [9, 16, 32, 64])
def test_a_chain_with_pdl_gives_the_bits_of_one_without(num_rows: int) -> None:
    """Layers in a graph whose kernels overlap give, at each of many replays, what the same kernels give one after the other."""
    heads, head_dim, intermediate, num_layers = 16, 128, 5632, 6
    hidden = heads * head_dim
    generator = torch.Generator(CUDA).manual_seed(num_rows)

    def weight(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=CUDA, dtype=torch.float16).mul_(size[-1] ** -0.5)

    layers = [
        (
            weight(3 * hidden, hidden),
            weight(hidden, hidden),
            weight(2 * intermediate, hidden),
            weight(hidden, intermediate),
        )
        for _ in range(num_layers)
    ]
    tuning = TileTuning(64, parts=1, num_stages=6)
    norm = torch.rand(hidden, generator=generator, device=CUDA).half()
    start = torch.randn(num_rows, hidden, generator=generator, device=CUDA).half()
    residual, normed = torch.empty_like(start), torch.empty_like(start)
    query = start.new_empty(num_rows, heads, head_dim)
    gated = start.new_empty(num_rows, intermediate)
    cache = start.new_zeros(num_layers, 2, 8, 16, heads, head_dim)
    table = rotary_table(torch.rand(head_dim // 2), 1.0, 100).to(CUDA)
    rope = RopePlan.for_step(table, torch.arange(num_rows, device=CUDA), torch.float16)
    slots = torch.randperm(128)[:num_rows].to(CUDA)

    def forward(*, pdl: bool) -> None:
        residual.copy_(start)
        normed_input: dict[str, Any] = {"norm": norm, "epsilon": EPSILON, "normed": normed, "pdl": pdl}
        for (qkv, o, gate_up, down), (keys, values) in zip(layers, cache, strict=True):
            tile_rows_qkv(residual, qkv, rope, slots, keys, values, query, **normed_input)
            tile_rows_linear_triton(query.flatten(1), o, residual, residual=residual, pdl=pdl, tuning=tuning)
            tile_rows_linear(residual, gate_up, gated, activation="silu", **normed_input)
            tile_rows_linear(gated, down, residual, residual=residual, pdl=pdl)

    forward(pdl=False)
    expected, expected_cache = residual.clone(), cache.clone()
    forward(pdl=True)
    assert torch.equal(residual, expected)
    assert not expected.isnan().any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(pdl=True)
    for _ in range(50):
        residual.fill_(torch.nan)
        cache.zero_()
        graph.replay()
        assert torch.equal(residual, expected)
        assert torch.equal(cache, expected_cache)


def test_no_numbers_are_hidden() -> None:
    """Not a number in, not a number out, in that row alone."""
    for num_rows in (9, 40):
        x = torch.ones(num_rows, 4096, dtype=torch.float16, device=CUDA)
        x[1, 77] = torch.nan
        weight = torch.ones(64, 4096, dtype=torch.float16, device=CUDA)
        for activation in (None, "silu"):
            result = tile_rows_linear(x, weight, norm=x[0], epsilon=1e-5, activation=activation)
            assert result[1].isnan().all()
            assert not result[0].isnan().any()
            assert not result[2:].isnan().any()


def test_times() -> None:
    """Prints microseconds of each product and of layers in a chain; up to 32 rows it beats torch and separate kernels."""
    result = measure([16, 32, 64], sweeps=False)
    for chain in result["chains"]:
        if chain["rows"] <= 32:
            assert chain["rule with PDL"] < chain["torch and separate kernels"]
