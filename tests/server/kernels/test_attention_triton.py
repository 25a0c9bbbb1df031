"""The attention kernels where there is no GPU: interpreted they give what the definition gives, and they compile for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hotgraph_server.kernels.attention_triton import (
    FULL_GRID,
    LANE_GRID,
    MAX_SPLITS,
    DeviceRows,
    split_count,
    triton_attention,
)
from tests.server.kernels.compiler import compile_launches, spills
from tests.server.kernels.interpreter import run_interpreted


def attend(
    num_tokens: int,
    num_rows: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.float16,
    max_blocks: int = 8,
    **options: Any,
) -> None:
    query = torch.ones(num_tokens, heads[0], head_dim, dtype=dtype)
    cache = torch.ones(2, 16, heads[1], head_dim, dtype=dtype)
    rows = DeviceRows(
        block_tables=torch.zeros(num_rows, max_blocks, dtype=torch.int32),
        context_lens=torch.zeros(num_rows, dtype=torch.int32),
        query_starts=torch.zeros(num_rows + 1, dtype=torch.int32),
        num_tokens=num_tokens,
        block_size=16,
    )
    arguments = {"scaling": 1.0, "window": None, "softcap": None, "sinks": None} | options
    triton_attention(query, cache, cache, rows, torch.empty_like(query), **arguments)


def test_interpreted_kernels_give_what_the_definition_gives() -> None:
    """Every check of `interpreted_attention.py` holds."""
    run_interpreted(Path(__file__).with_name("interpreted_attention.py"))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8)], ids=["MHA", "GQA"])
def test_kernels_fit_registers(heads: tuple[int, int], head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sm_90 all kernels compile in 16 bits: decode with splits and without, tiles; nothing spills."""
    kernels = compile_launches(monkeypatch)
    attend(1, 1, heads, head_dim)
    attend(64, 64, heads, head_dim)
    attend(64, 1, heads, head_dim)
    assert [kernel.name for kernel in kernels] == ["decode_kernel", "decode_kernel", "tile_kernel"]
    assert not any(map(spills, kernels))


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "options"),
    [
        ((35, 1), 64, torch.float16, {}),
        ((6, 2), 96, torch.float32, {}),
        ((8, 4), 256, torch.bfloat16, {"softcap": 50.0, "window": 4096}),
        ((8, 1), 64, torch.bfloat16, {"window": 128, "sinks": torch.ones(8, dtype=torch.bfloat16)}),
    ],
    ids=["MQA of 35", "float32, GQA 96", "softcap, GQA 256", "sinks, GQA 64"],
)
def test_kernels_compile(
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For sm_90 they compile, within the shared memory of a multiprocessor, whatever a model brings."""
    kernels = compile_launches(monkeypatch)
    attend(24, 8, heads, head_dim, dtype, **options)
    assert [kernel.name for kernel in kernels] == ["decode_kernel", "tile_kernel"]
    assert all(kernel.metadata.shared <= 227 * 1024 for kernel in kernels)


def test_no_shape_of_a_step_needs_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer's two kernels there are five variants, however many tokens, rows, blocks or splits a step has."""
    kernels = compile_launches(monkeypatch)
    for num_tokens in (*range(1, 9), 16, 17, 31, 32, 40, 63, 64, 100, 128, 200, 256):
        attend(num_tokens, num_tokens, (8, 8), 64, max_blocks=num_tokens)
    for num_rows in (1, 2, 3, 16):
        for num_tokens in (17, 32, 100, 512):
            attend(num_tokens, num_rows, (8, 8), 64, max_blocks=num_rows)
    for window in (1, 16, 100):
        attend(32, 16, (8, 8), 64, window=window)
    assert len({id(kernel) for kernel in kernels}) == 5


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["MHA", "GQA"])
def test_in_a_chain_decode_waits_before_it_reads(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With pdl the kernel of decode rows waits once, before all loads, branches and stores, then lets the next one start.

    The kernel of tiles knows nothing of it, and without pdl neither does.
    """
    kernels = compile_launches(monkeypatch)
    for pdl in (False, True):
        attend(2, 2, heads, 64, pdl=pdl)
        attend(40, 3, heads, 64, pdl=pdl)
    assert [kernel.name for kernel in kernels] == ["decode_kernel", "decode_kernel", "tile_kernel"] * 2
    for index, kernel in enumerate(kernels):
        is_linked = index in {3, 4}
        assert bool(kernel.metadata.launch_pdl) == is_linked
        assert ("griddepcontrol" in kernel.asm["ptx"]) == is_linked
        if is_linked:
            before, after = kernel.asm["ptx"].split("griddepcontrol.wait")
            assert not any(word in before for word in ("ld.global", "st.global", "bra", "ret;", "launch_dependents"))
            assert after.count("griddepcontrol.launch_dependents") == 1
            before, after = kernel.asm["sass"].split("ACQBULK")
            assert not any(word in before for word in ("LDG", "STG", "BRA", "EXIT"))
            assert "LDG" in after
            assert not spills(kernel)


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8, 32, 40, 71, 300])
def test_splits_fill_the_grid(num_kv_heads: int) -> None:
    """There are no more splits than fill the grid, at most 16, and one when rows fill it by themselves."""
    for num_rows in range(1, 65):
        for is_grouped, wanted in ((True, FULL_GRID), (False, LANE_GRID)):
            num_splits = split_count(num_rows, num_kv_heads, is_grouped=is_grouped)
            num_programs = num_rows * num_kv_heads
            assert (num_splits == 1) == (num_programs >= FULL_GRID)
            if num_splits > 1:
                assert num_splits == MAX_SPLITS or num_programs * num_splits >= wanted
                assert num_programs * num_splits < 2 * wanted
