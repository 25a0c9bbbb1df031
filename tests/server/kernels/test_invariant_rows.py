"""Products and attention in one order for any number of rows: how they are cut up, and that their kernels compile for a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hotgraph_server.kernels.attention_rows import DeviceRows
from hotgraph_server.kernels.attention_triton import triton_attention
from hotgraph_server.kernels.few_rows import few_rows_reference
from hotgraph_server.kernels.few_rows_triton import normed_triton
from hotgraph_server.kernels.invariant_rows import (
    ROOMS,
    invariant_linear,
    invariant_product,
    room_for,
    tuned,
)
from hotgraph_server.kernels.norm import add_rms_norm_triton, rms_norm_triton
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.row_sums import row_cumsum_triton, row_logsumexp_triton
from hotgraph_server.kernels.tile_rows_triton import tile_rows_linear_triton, tile_rows_qkv_triton
from tests.server.kernels.before_wait import before_wait
from tests.server.kernels.compiler import compile_launches, num_spills, spills
from tests.server.kernels.few_rows_checks import Product, draw
from tests.server.kernels.interpreter import run_interpreted
from tests.server.kernels.test_tile_rows_triton import LAYER, SHARED_BYTES_OF_A_MULTIPROCESSOR, assert_ring

CPU = torch.device("cpu")
ROW_COUNTS = (*range(1, 66), 100, 127, 128, 129, 200, 256, 257, 300, 384, 385, 512, 513, 1000, 1024)


def shape_of(product: Product) -> tuple[int, int]:
    return product.num_outputs * (1 if product.activation is None else 2), product.num_inputs


def test_interpreted_kernels_give_the_same_bits() -> None:
    """Every check of `interpreted_invariant.py` holds."""
    run_interpreted(Path(__file__).with_name("interpreted_invariant.py"))


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("num_inputs", [16, 576, 1536, 2048, 4096, 8192, 11008, 14336, 28672])
@pytest.mark.parametrize("num_outputs", [16, 576, 960, 2048, 2880, 3072, 4096, 5120, 8192, 12288, 128256])
def test_no_sum_is_split(num_outputs: int, num_inputs: int, is_normed: bool) -> None:
    """For all numbers of rows, and whatever stands behind the product, one program goes through all columns.

    And what is launched is sound: the ring fits, no stage is requested in vain, and boxes divide heads.
    """
    kinds = [(False, 0), (True, 0), (False, 32), (False, 64), (False, 96), (False, 128)] if is_normed else [(False, 0)]
    for is_gated, head_dim in kinds:
        for num_rows in ROW_COUNTS:
            tuning = tuned(num_rows, num_outputs, num_inputs, is_gated=is_gated, is_normed=is_normed, head_dim=head_dim)
            assert tuning.splits == 1
            assert tuning.stretch(num_inputs) >= num_inputs
            room = room_for(num_rows, is_normed=is_normed, head_dim=head_dim)
            assert tuning.shared_bytes(room) <= SHARED_BYTES_OF_A_MULTIPROCESSOR - 1024
            assert 1 <= tuning.num_stages <= -(-num_inputs // (64 * tuning.parts))
            assert tuning.block_rows >= 32
            assert tuning.num_warps == (8 if tuning.block_rows == 128 else 4)
            if head_dim > 0:
                assert head_dim % tuning.block_rows == 0


def test_rooms_hold_all_rows() -> None:
    """Up to 64 rows in one program, beyond in blocks; padding is less than a block."""
    for is_normed, head_dim in ((False, 0), (True, 0), (True, 64)):
        for num_rows in range(1, 1100):
            room = room_for(num_rows, is_normed=is_normed, head_dim=head_dim)
            assert room in ROOMS
            num_blocks = -(-num_rows // room)
            assert num_blocks == 1 or room > 64
            assert num_blocks * room <= max(2 * num_rows, 8)
            assert room <= (256 if is_normed and head_dim == 0 else 128)


def launch(product: Product, num_rows: int) -> None:
    """Tensors without numbers: nothing is computed."""
    num_weight_rows, num_inputs = shape_of(product)
    tuning = tuned(
        num_rows,
        num_weight_rows,
        num_inputs,
        is_gated=product.activation is not None,
        is_normed=product.has_norm,
    )
    out = torch.empty(num_rows, product.num_outputs).half()
    tile_rows_linear_triton(
        torch.empty(num_rows, num_inputs).half(),
        torch.empty(num_weight_rows, num_inputs).half(),
        out,
        bias=torch.empty(num_weight_rows).half() if product.has_bias else None,
        activation=product.activation,
        residual=out if product.has_residual else None,
        pdl=True,
        tuning=tuning,
        room=room_for(num_rows, is_normed=product.has_norm),
    )


@pytest.mark.parametrize("num_rows", [8, 64, 128, 256])
@pytest.mark.parametrize("name", LAYER)
def test_products_compile(name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90 nothing spills, the ring is requested before the wait, and tokens, stores and atomics come after it."""
    product = LAYER[name]
    kernels = compile_launches(monkeypatch)
    launch(product, num_rows)
    is_gated = product.activation is not None
    tuning = tuned(num_rows, *shape_of(product), is_gated=is_gated, is_normed=product.has_norm)
    assert_ring(kernels[-1], tuning, room_for(num_rows, is_normed=product.has_norm), is_paired=is_gated)


@pytest.mark.parametrize("num_rows", [8, 128, 300])
@pytest.mark.parametrize(("heads", "hidden"), [((32, 32, 128), 4096), ((9, 3, 64), 576)])
def test_queries_keys_and_values_compile(
    heads: tuple[int, int, int], hidden: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rope and the write to the cache behind it, too, for blocks of 128 tokens at most."""
    num_heads, num_kv_heads, head_dim = heads
    kernels = compile_launches(monkeypatch)
    num_outputs = (num_heads + 2 * num_kv_heads) * head_dim
    x, weight = torch.empty(num_rows, hidden).bfloat16(), torch.empty(num_outputs, hidden).bfloat16()
    cache = torch.empty(2, 4, 16, num_kv_heads, head_dim).bfloat16()
    indices = torch.zeros(num_rows, dtype=torch.int64)
    rope = RopePlan(torch.ones(10, head_dim), indices, None)
    tuning = tuned(num_rows, num_outputs, hidden, is_gated=False, is_normed=True, head_dim=head_dim)
    room = room_for(num_rows, is_normed=True, head_dim=head_dim)
    tile_rows_qkv_triton(x, weight, rope, indices, *cache, pdl=True, tuning=tuning, room=room)
    assert_ring(kernels[-1], tuning, room, is_paired=True)


def test_one_kernel_for_each_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows a step has: one kernel for each room, and one for several blocks of 128."""
    kernels = compile_launches(monkeypatch)
    for num_rows in (1, 7, 8, 9, 20, 33, 64, 65, 100, 128, 129, 256, 300, 384, 512):
        launch(Product(576, 5000, has_norm=True), num_rows)
    assert len({kernel.hash for kernel in kernels}) <= len(ROOMS) + 1


def test_the_norms_before_short_and_long_products_add_up_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """`norm_kernel` and the norm after a sum have each number in the same thread, so their sums have one order."""
    kernels = compile_launches(monkeypatch)
    for size in (576, 4096, 5120):
        x, weight = torch.empty(300, size).half(), torch.empty(size).half()
        kernels.clear()
        rms_norm_triton(x, weight, 1e-5)
        add_rms_norm_triton(x, torch.empty_like(x), weight, 1e-5)
        normed_triton(x, weight, 1e-5, None, pdl=True)
        layouts = {tuple(re.findall(r"#blocked\w* = (.*)", kernel.asm["ttgir"])) for kernel in kernels}
        assert len(kernels) == 3
        assert len(layouts) == 1
        assert all(layouts)


def test_on_the_cpu_it_is_the_definition() -> None:
    """In place onto the residual, and into a new tensor, for more rows than one program has room for."""
    product = Product(336, 45, has_norm=True, has_bias=True, activation="silu", has_residual=True)
    inputs = draw(product, 70, torch.float16, CPU, seed=1)
    options: dict[str, Any] = {"bias": inputs.bias, "norm": inputs.norm, "epsilon": 1e-5, "activation": "silu"}
    expected = few_rows_reference(inputs.x, inputs.weight, residual=inputs.residual, **options)
    assert inputs.residual is not None
    assert torch.equal(invariant_linear(inputs.x, inputs.weight, residual=inputs.residual, **options), expected)
    out = inputs.residual.clone()
    assert invariant_linear(inputs.x, inputs.weight, out, residual=out, **options) is out
    assert torch.equal(out, expected)
    plain = few_rows_reference(inputs.x, inputs.weight, bias=inputs.bias)
    assert torch.equal(invariant_product(inputs.x, inputs.weight, bias=inputs.bias), plain)
    wide = torch.empty_like(plain)
    assert invariant_product(inputs.x, inputs.weight, wide, bias=inputs.bias) is wide
    assert torch.equal(wide, plain)


def attend(num_tokens: int, num_rows: int, heads: tuple[int, int], head_dim: int, **options: Any) -> None:
    query = torch.ones(num_tokens, heads[0], head_dim).half()
    cache = torch.ones(2, 16, heads[1], head_dim).half()
    rows = DeviceRows(
        block_tables=torch.zeros(num_rows, 64, dtype=torch.int32),
        context_lens=torch.zeros(num_rows, dtype=torch.int32),
        query_starts=torch.zeros(num_rows + 1, dtype=torch.int32),
        num_tokens=num_tokens,
        block_size=16,
    )
    arguments = {"scaling": 1.0, "window": None, "softcap": None, "sinks": None, "pdl": True} | options
    triton_attention(query, cache, cache, rows, torch.empty_like(query), is_invariant=True, **arguments)


@pytest.mark.parametrize(
    ("heads", "head_dim", "options"),
    [
        ((32, 32), 128, {}),
        ((32, 8), 128, {}),
        ((9, 3), 64, {}),
        ((6, 2), 96, {}),
        ((8, 4), 256, {"softcap": 50.0, "window": 4096}),
        ((8, 1), 64, {"window": 128, "sinks": torch.ones(8).half()}),
    ],
    ids=str,
)
def test_attention_is_few_kernels_for_all_steps(
    heads: tuple[int, int], head_dim: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode, shared among programs or not, prompts and mixed steps: a binary, or two where there are small tiles.

    All their ways pass one wait, before which they read no query, key or value and write nothing; next to nothing is spilt.
    """
    kernels = compile_launches(monkeypatch)
    for num_tokens, num_rows in ((1, 1), (2, 2), (7, 7), (64, 64), (200, 200), (16, 1), (33, 2), (300, 1), (512, 64)):
        attend(num_tokens, num_rows, heads, head_dim, **options)
    binaries = {kernel.hash: kernel for kernel in kernels}
    assert len(binaries) == (2 if head_dim in {64, 128} else 1)
    for kernel in binaries.values():
        # One warp has 255 registers a lane for the places of 64 keys and values, and keeps a few of these in memory.
        assert num_spills(kernel) <= (40 if kernel.metadata.num_warps == 1 else 0)
        assert kernel.metadata.shared <= (48 if kernel.metadata.num_warps == 1 else 227) * 1024
        ptx = kernel.asm["ptx"]
        assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1
        early = before_wait(kernel)
        assert set(early.reads) == {"context_lens", "query_starts"}
        assert not early.writes
        before, after = kernel.asm["sass"].split("ACQBULK")
        assert not re.search(r"\b(STG|RED|ATOMG?|STL|EXIT)\b", before)
        assert not re.search(r"\b(LDG\.E\.128|LDGSTS|HGMMA|HMMA)", before)
        assert re.search(r"\bSTG", after)
        # In both places that add shares up the product and the sum are one operation, by request.
        assert "fma.rn.f32" in ptx


def test_sums_of_rows_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel each for all numbers of rows."""
    kernels = compile_launches(monkeypatch)
    for num_rows in (1, 2, 16, 64):
        row_logsumexp_triton(torch.empty(num_rows, 32000))
        row_cumsum_triton(torch.empty(num_rows, 32000, dtype=torch.float64))
    assert len({kernel.hash for kernel in kernels}) == 2
    assert not any(map(spills, kernels))
