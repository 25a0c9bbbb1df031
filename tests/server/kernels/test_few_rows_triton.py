"""Products for few rows where there is no GPU: interpreted they give what the definition gives, and they compile for one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hotgraph_server.kernels.few_rows_cuts import MAX_ROWS, SumTuning, tuned
from hotgraph_server.kernels.few_rows_triton import few_rows_linear_triton, few_rows_qkv_triton
from hotgraph_server.kernels.rope import RopePlan
from tests.server.kernels.before_wait import before_wait
from tests.server.kernels.compiler import compile_launches, num_loads_before_wait, spills
from tests.server.kernels.few_rows_checks import Product
from tests.server.kernels.interpreter import run_interpreted

HIDDEN, INTERMEDIATE = 4096, 11008
LAYER = {
    "qkv": Product(HIDDEN, 3 * HIDDEN, has_norm=True),
    "o": Product(HIDDEN, HIDDEN, has_residual=True),
    "gate_up": Product(HIDDEN, INTERMEDIATE, has_norm=True, activation="silu"),
    "down": Product(INTERMEDIATE, HIDDEN, has_residual=True),
}
NUM_MULTIPROCESSORS = 132

# What must be on its way to a multiprocessor that reads 4.6 TB/s / 132 and waits a microsecond for it.
BYTES_IN_FLIGHT = 35_000


def assert_reads_weights_alone(kernels: list[Any], **num_loads: int) -> None:
    """Before its wait a product reads its weight, and its norm and bias where it has them; a norm reads its weight. Nothing is
    written there. num_loads: of the product, by what is read."""
    *norms, product = kernels
    for kernel in kernels:
        before = before_wait(kernel)
        assert not before.writes
        # As it will run, too.
        assert num_loads_before_wait(kernel) == before.reads.total()
    assert [set(before_wait(norm).reads) for norm in norms] == [{"norm"}] * len(norms)
    reads = before_wait(product).reads
    assert set(reads) <= {"weight", "norm", "bias"}
    assert {name: reads[name] for name in num_loads} == num_loads


def launch(product: Product, num_rows: int, *, pdl: bool, dtype: torch.dtype = torch.float16) -> None:
    """Tensors without numbers: nothing is computed."""
    num_weight_rows = product.num_outputs * (1 if product.activation is None else 2)
    out = torch.empty(num_rows, product.num_outputs, dtype=dtype)
    few_rows_linear_triton(
        torch.empty(num_rows, product.num_inputs, dtype=dtype),
        torch.empty(num_weight_rows, product.num_inputs, dtype=dtype),
        out,
        bias=torch.empty(num_weight_rows, dtype=dtype) if product.has_bias else None,
        norm=torch.empty(product.num_inputs, dtype=dtype) if product.has_norm else None,
        epsilon=1e-5,
        activation=product.activation,
        residual=out if product.has_residual else None,
        pdl=pdl,
    )


def num_registers(kernel: Any) -> int:
    """Of a thread, rounded up as they are handed out."""
    largest = max(int(number) for number in re.findall(r"\bR(\d+)\b", kernel.asm["sass"]))
    return -(-(largest + 1) // 8) * 8


def test_interpreted_kernels_give_what_the_definition_gives() -> None:
    """Every check of `interpreted_few_rows.py` holds."""
    run_interpreted(Path(__file__).with_name("interpreted_few_rows.py"))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 16])
@pytest.mark.parametrize("name", LAYER)
def test_kernels_for_a_7b_llama(name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing spills, enough of the weight is on its way at a time, and its first loads go out before the wait."""
    product = LAYER[name]
    kernels = compile_launches(monkeypatch)
    launch(product, num_rows, pdl=True)
    assert len(kernels) == (2 if product.has_norm and num_rows > 2 else 1)
    assert not any(map(spills, kernels))
    kernel = kernels[-1]
    num_weight_rows = product.num_outputs * (1 if product.activation is None else 2)
    is_gated = product.activation is not None
    tuning = tuned(num_rows, num_weight_rows, product.num_inputs, is_gated=is_gated, is_normed=product.has_norm)
    if isinstance(tuning, SumTuning):
        num_ahead = tuning.block_rows * min(tuning.tile * tuning.ahead, product.num_inputs)
    else:
        num_ahead = tuning.block_rows * 32 * tuning.parts * tuning.num_warps * tuning.ahead
    num_threads = 32 * tuning.num_warps
    num_loads = num_ahead * 2 // (16 * num_threads)

    ptx = kernel.asm["ptx"]
    assert ptx.count("griddepcontrol.launch_dependents") == ptx.count("griddepcontrol.wait") == 1
    before, after = ptx.split("griddepcontrol.wait")
    wide_load = re.compile(r"ld\.global\S*evict_first\S*\.v4\.b32")
    assert len(wide_load.findall(before)) == num_loads
    assert_reads_weights_alone(kernels, weight=num_loads)
    # As it will run, too: the assembler may order loads anew.
    before, after = kernel.asm["sass"].split("ACQBULK")
    assert len(re.findall(r"LDG\.E\.EF\.128", before)) == num_loads
    assert "STG" not in before
    assert "STG" in after

    programs_that_fit = min(65536 // (num_registers(kernel) * num_threads), 2048 // num_threads)
    programs_there = num_weight_rows // tuning.block_rows / NUM_MULTIPROCESSORS
    assert min(programs_that_fit, programs_there) * num_ahead * 2 > BYTES_IN_FLIGHT


@pytest.mark.parametrize("num_rows", [1, 2, 3, 16])
def test_queries_keys_and_values_in_one_kernel(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rope and the write to the cache behind it the QKV product does not spill either, and waits before both.

    What it turns heads by is the step's, and not read before that; its first tiles are requested then.
    """
    kernels = compile_launches(monkeypatch)
    x, weight = torch.empty(num_rows, HIDDEN).half(), torch.empty(6144, HIDDEN).half()
    cache = torch.empty(2, 4, 16, 8, 128).half()
    indices = torch.zeros(num_rows, dtype=torch.int64)
    rope = RopePlan(torch.ones(10, 128), indices, None)
    few_rows_qkv_triton(x, weight, rope, indices, *cache, norm=weight[0], epsilon=1e-5, pdl=True)
    assert len(kernels) == (1 if num_rows <= 2 else 2)
    assert not any(map(spills, kernels))
    _, after = kernels[-1].asm["ptx"].split("griddepcontrol.wait")
    assert_reads_weights_alone(kernels)
    assert before_wait(kernels[-1]).reads["weight"] >= 8
    assert "griddepcontrol.launch_dependents" in after
    assert after.count("st.global") >= 6


@pytest.mark.parametrize("num_rows", [3, 16])
def test_tensor_cores_are_fed_from_registers(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lane loads is what it multiplies: nothing goes from thread to thread before the sums of the warps."""
    kernels = compile_launches(monkeypatch)
    launch(LAYER["o"], num_rows, pdl=False, dtype=torch.bfloat16)
    machine_code = kernels[-1].asm["sass"]
    loop = machine_code[: machine_code.rindex("HMMA")]
    assert "HMMA" in loop
    assert not re.search(r"SHFL|LDS|STS|LDSM", loop)


def test_without_pdl_no_kernel_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instructions of programmatic dependent launch are there only when it is asked for."""
    kernels = compile_launches(monkeypatch)
    for pdl in (False, True):
        for num_rows in (1, 3):
            launch(Product(576, 960, has_norm=True), num_rows, pdl=pdl)
    assert [kernel.name for kernel in kernels] == ["sums_kernel", "norm_kernel", "dots_kernel"] * 2
    for index, kernel in enumerate(kernels):
        assert ("griddepcontrol" in kernel.asm["ptx"]) == (index >= 3)
        assert bool(kernel.metadata.launch_pdl) == (index >= 3)


def test_four_kernels_serve_all_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for one row, one for two, one for up to 8 and one for up to 16, and one norm."""
    kernels = compile_launches(monkeypatch)
    for num_rows in range(1, MAX_ROWS + 1):
        launch(Product(576, 1536, has_norm=True, activation="silu"), num_rows, pdl=True)
    hashes = {
        name: {k.hash for k in kernels if k.name == name} for name in ("sums_kernel", "norm_kernel", "dots_kernel")
    }
    assert {name: len(found) for name, found in hashes.items()} == {
        "sums_kernel": 2,
        "norm_kernel": 1,
        "dots_kernel": 2,
    }
