"""The kernel of products in one order where there is no GPU: it compiles for one, in the order that it has to have."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch

from hotgraph_server.kernels.few_rows_triton import normed_triton
from hotgraph_server.kernels.norm import add_rms_norm_triton, rms_norm_triton
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.tile_rows_cuts import TileTuning, room_for, tuned
from hotgraph_server.kernels.tile_rows_triton import readable_rows, tile_rows_linear_triton, tile_rows_qkv_triton
from tests.server.kernels.before_wait import Before, before_wait
from tests.server.kernels.compiler import compile_launches, num_loads_before_wait, spills
from tests.server.kernels.few_rows_checks import Product

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
LAYER = {
    "qkv": Product(HIDDEN, 3 * HIDDEN, has_norm=True, has_bias=True),
    "o": Product(HIDDEN, HIDDEN, has_residual=True),
    "gate_up": Product(HIDDEN, INTERMEDIATE, has_norm=True, activation="silu"),
    "down": Product(INTERMEDIATE, HIDDEN, has_residual=True),
    "head": Product(HIDDEN, VOCABULARY, has_norm=True),
}
ROWS = (8, 16, 32, 64, 128, 256)
NUM_MULTIPROCESSORS = 132
SHARED_BYTES_OF_A_MULTIPROCESSOR = 233_472

# What must be on its way to a multiprocessor that reads 4.6 TB/s / 132 and waits a microsecond for it.
BYTES_IN_FLIGHT = 35_000


def launch(
    product: Product,
    num_rows: int,
    *,
    pdl: bool,
    dtype: torch.dtype = torch.float16,
    out_dtype: torch.dtype | None = None,
    tuning: TileTuning | None = None,
) -> None:
    """Tensors without numbers: nothing is computed."""
    num_weight_rows = product.num_outputs * (1 if product.activation is None else 2)
    out = torch.empty(num_rows, product.num_outputs, dtype=out_dtype or dtype)
    tile_rows_linear_triton(
        torch.empty(num_rows, product.num_inputs, dtype=dtype),
        torch.empty(num_weight_rows, product.num_inputs, dtype=dtype),
        out,
        bias=torch.empty(num_weight_rows, dtype=dtype) if product.has_bias else None,
        norm=torch.empty(product.num_inputs, dtype=dtype) if product.has_norm else None,
        epsilon=1e-5,
        activation=product.activation,
        residual=out if product.has_residual else None,
        pdl=pdl,
        tuning=tuning,
    )


def assert_ring(kernel: Any, tuning: TileTuning, room: int, *, is_paired: bool) -> None:
    """Of a kernel with PDL: its order, in what the GPU runs, and what it takes of a multiprocessor."""
    assert not spills(kernel)
    assert kernel.metadata.shared <= tuning.shared_bytes(room) + 16 * 8  # barriers, each on a line of its own
    ptx = kernel.asm["ptx"]
    assert ptx.count("griddepcontrol.launch_dependents") == ptx.count("griddepcontrol.wait") == 1
    # All of the ring is requested before the wait, and nothing else: tokens and all that is written come after it.
    num_boxes = tuning.num_stages * tuning.parts * (2 if is_paired else 1)
    assert before_wait(kernel) == Before(reads=Counter(weight=num_boxes), writes=Counter())
    assert num_loads_before_wait(kernel) == num_boxes
    before, after = kernel.asm["sass"].split("ACQBULK")
    assert before.count("UTMALDG.2D") == num_boxes
    assert not re.search(r"\b(STG|RED|ATOM)", before)
    assert before.index("UTMACCTL.PF") < before.index("UTMALDG")
    assert "FENCE.VIEW.ASYNC.G" in after[: after.index("UTMALDG.2D")]
    # The tensor cores are not waited for within a step of the loop, and the next kernel is let start behind it, or before.
    start, end = after.split("PREEXIT")
    loop, other = (start, end) if tuning.triggers_late else (end, start)
    assert not re.search(r"\bHMMA", loop)
    assert loop.count("HGMMA") == 4 * tuning.parts * (tuning.tile_rows // (16 * tuning.num_warps))
    last = [] if tuning.triggers_late else ["0x0"]  # all products, which then are waited for here
    assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", loop) == [hex(tuning.parts), *last]
    assert "HGMMA" not in other
    # All warps are done with a stage when it is requested anew, if the ring does not hold all there is.
    refill = loop[loop.index("WARPGROUP.DEPBAR") :]
    if "UTMALDG.2D" in refill:
        assert refill.index("BAR.SYNC") < refill.index("UTMALDG.2D")
    # And with all of the ring when its memory is written anew.
    tail = ptx[re.search(r"wgmma\.wait_group\.sync\.aligned\s+0;", ptx).end() :]  # type: ignore[union-attr]
    if "st.shared" in tail:
        assert "bar.sync" in tail[: tail.index("st.shared")]
    assert re.search(r"\bSTG", end)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("name", LAYER)
def test_kernels_for_a_7b_llama(name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing spills, enough of the weight is on its way at a time, and all of that goes out before the wait."""
    product = LAYER[name]
    kernels = compile_launches(monkeypatch)
    launch(
        product,
        num_rows,
        pdl=True,
        out_dtype=torch.float32 if name == "head" else None,
    )
    assert [kernel.name for kernel in kernels] == ["norm_kernel"] * product.has_norm + ["tiles_kernel"]
    assert all(set(before_wait(norm).reads) == {"norm"} for norm in kernels[:-1])
    is_gated = product.activation is not None
    num_weight_rows = product.num_outputs * (2 if is_gated else 1)
    tuning = tuned(
        num_rows,
        num_weight_rows,
        product.num_inputs,
        is_gated=is_gated,
        is_normed=product.has_norm,
    )
    room = room_for(num_rows, is_normed=product.has_norm)
    assert_ring(kernels[-1], tuning, room, is_paired=is_gated)
    bytes_ahead = tuning.block_rows * 128 * tuning.parts * tuning.num_stages
    programs_that_fit = SHARED_BYTES_OF_A_MULTIPROCESSOR // (tuning.shared_bytes(room) + 1024)
    programs_there = num_weight_rows / tuning.block_rows / NUM_MULTIPROCESSORS
    # Beyond 64 rows the products are the time.
    assert num_rows > 64 or min(programs_that_fit, programs_there) * bytes_ahead > BYTES_IN_FLIGHT


@pytest.mark.parametrize(
    ("heads", "hidden", "num_rows"),
    [
        ((32, 8, 128), 4096, 16),
        ((32, 32, 128), 4096, 32),
        ((32, 8, 128), 4096, 64),
        ((9, 3, 64), 576, 32),
        ((6, 6, 96), 576, 16),
        ((32, 32, 128), 4096, 8),
        ((9, 3, 64), 576, 128),
        ((32, 32, 128), 4096, 300),
    ],
)
def test_queries_keys_and_values_in_one_kernel(
    heads: tuple[int, int, int], hidden: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rope and the write to the cache behind it the QKV product does not spill either, whatever the size of heads."""
    num_heads, num_kv_heads, head_dim = heads
    kernels = compile_launches(monkeypatch)
    num_outputs = (num_heads + 2 * num_kv_heads) * head_dim
    x, weight = torch.empty(num_rows, hidden).bfloat16(), torch.empty(num_outputs, hidden).bfloat16()
    cache = torch.empty(2, 4, 16, num_kv_heads, head_dim).bfloat16()
    indices = torch.zeros(num_rows, dtype=torch.int64)
    rope = RopePlan(torch.ones(10, head_dim), indices, None)
    bias = torch.empty(num_outputs).bfloat16()
    tile_rows_qkv_triton(x, weight, rope, indices, *cache, bias=bias, norm=weight[0], epsilon=1e-5, pdl=True)
    tuning = tuned(num_rows, num_outputs, hidden, is_gated=False, is_normed=True, head_dim=head_dim)
    assert_ring(kernels[-1], tuning, room_for(num_rows, is_normed=True, head_dim=head_dim), is_paired=True)
    before, after = kernels[-1].asm["ptx"].split("griddepcontrol.wait")
    assert "ld.global" not in before  # the positions are another kernel's
    assert len(re.findall(r"st\.global\S*\.v4", after)) >= 4


def test_rows_are_read_where_there_is_memory() -> None:
    """As many as fill the room if the tensor's memory holds them from x on, else those of x."""
    room = torch.empty(64, 24)
    assert readable_rows(room[:40], 64) == 64
    assert readable_rows(room[1:41], 64) == 40
    assert readable_rows(room[1:41], 48) == 48
    assert readable_rows(room, 64) == 64
    assert readable_rows(room, 128) == 64
    assert readable_rows(torch.empty(40, 24), 64) == 40
    assert readable_rows(torch.empty(64, 4, 6)[:40].flatten(1), 64) == 64


def test_without_pdl_no_kernel_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instructions of programmatic dependent launch are there only when it is asked for."""
    kernels = compile_launches(monkeypatch)
    for pdl in (False, True):
        launch(Product(576, 960, has_norm=True), 20, pdl=pdl)
    assert [kernel.name for kernel in kernels] == ["norm_kernel", "tiles_kernel"] * 2
    for index, kernel in enumerate(kernels):
        assert ("griddepcontrol" in kernel.asm["ptx"]) == (index >= 2)
        assert bool(kernel.metadata.launch_pdl) == (index >= 2)


def test_the_next_kernel_can_start_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuning may let it start before the products, but never before the kernel's own wait."""
    kernels = compile_launches(monkeypatch)
    tuning = TileTuning(64, parts=1, num_stages=3, triggers_late=False)
    launch(Product(576, 960), 20, pdl=True, tuning=tuning)
    assert re.search(r"ACQBULK.*PREEXIT.*HGMMA", kernels[0].asm["sass"], re.DOTALL)


def test_few_kernels_serve_all_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each room and one for several blocks of 128 rows, and one norm."""
    kernels = compile_launches(monkeypatch)
    for num_rows in (*range(1, 66), 100, 128, 129, 256, 300, 384, 512):
        launch(Product(576, 5000, has_norm=True), num_rows, pdl=True)
    hashes = {name: {k.hash for k in kernels if k.name == name} for name in ("norm_kernel", "tiles_kernel")}
    assert len(hashes["norm_kernel"]) == 1
    assert 6 <= len(hashes["tiles_kernel"]) <= 7


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


def test_every_activation_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a model may name, with a bias."""
    kernels = compile_launches(monkeypatch)
    for activation in ("swish", "gelu", "gelu_pytorch_tanh", "relu"):
        launch(Product(576, 1536, activation=activation, has_bias=True), 20, pdl=False)
    assert not any(map(spills, kernels))
    assert len({kernel.hash for kernel in kernels}) == 4
