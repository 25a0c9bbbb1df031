"""The attention kernels where there is no GPU: interpreted they give what the definition gives, and they compile for one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hotgraph_server.kernels.attention_triton import (
    FULL_GRID,
    LANE_GRID,
    LONG_SHARE,
    LONG_SPLITS,
    MAX_SPLITS,
    DeviceRows,
    split_count,
    triton_attention,
)
from hotgraph_server.kernels.few_rows import tuned
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


def num_registers(kernel: Any) -> int:
    return 1 + max(int(number) for number in re.findall(r"\bR(\d+)\b", kernel.asm["sass"]))


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
    attend(64, 64, heads, head_dim, max_blocks=1024)
    attend(64, 1, heads, head_dim)
    assert [kernel.name for kernel in kernels] == ["decode_kernel"] * 3 + ["tile_kernel"]
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


@pytest.mark.parametrize(("max_blocks", "num_variants"), [(8, 4), (1024, 3)], ids=["short rows", "long rows"])
def test_no_shape_of_a_step_needs_a_kernel_of_its_own(
    max_blocks: int, num_variants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer's two kernels there are four variants at most, however many tokens, rows, splits or keys seen a step has."""
    kernels = compile_launches(monkeypatch)
    for num_tokens in (*range(1, 9), 16, 17, 31, 32, 40, 63, 64, 100, 128, 200, 256):
        attend(num_tokens, num_tokens, (8, 8), 64, max_blocks=max_blocks)
    for num_rows in (1, 2, 3, 16):
        for num_tokens in (17, 32, 100, 512):
            attend(num_tokens, num_rows, (8, 8), 64, max_blocks=max_blocks)
    for window in (1, 16, 100):
        attend(32, 16, (8, 8), 64, max_blocks=max_blocks, window=window)
    assert len({id(kernel) for kernel in kernels}) == num_variants


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["MHA", "GQA"])
def test_in_a_chain_decode_waits_on_all_its_ways(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With pdl the kernel of decode rows waits, and then lets the next one start, before all stores and atomics.

    It does so, too, where a row is left to the kernel of tiles, which knows nothing of it. Without pdl none does.
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
            assert not spills(kernel)
            # The way of rows that are left to the tiles, and the other.
            ptx = kernel.asm["ptx"]
            assert ptx.count("griddepcontrol.launch_dependents") == ptx.count("griddepcontrol.wait") == 2
            machine_code = kernel.asm["sass"]
            # Tables, keys and values stand before the wait; nothing is written there.
            before, after, left = machine_code.split("ACQBULK")
            assert not any(word in before for word in ("STG", "RED", "ATOM", "STL"))
            assert "STG" in after
            assert not any(word in left for word in ("LDG", "STG", "RED", "ATOM"))


@pytest.mark.parametrize(
    ("heads", "num_rows", "dtype", "head_dim"),
    [
        ((32, 32), 1, torch.float16, 128),
        ((32, 32), 8, torch.bfloat16, 128),
        ((32, 32), 64, torch.float16, 64),
        ((32, 8), 1, torch.bfloat16, 128),
        ((32, 8), 1, torch.float16, 64),
    ],
    ids=str,
)
def test_two_tiles_are_requested_before_the_wait(
    heads: tuple[int, int], num_rows: int, dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 16 bytes a load; and between the wait and the query's load no thread has to wait for one of them.

    In the loop what was loaded is not copied: a tile is on its way while the other is worked on.
    """
    kernels = compile_launches(monkeypatch)
    attend(num_rows, num_rows, heads, head_dim, dtype, pdl=True)
    (kernel,) = kernels
    assert not spills(kernel)
    num_threads = 32 * kernel.metadata.num_warps
    tile_keys = 16 if heads[0] == heads[1] and num_rows != 8 else 32
    num_loads = 2 * 2 * tile_keys * head_dim * 2 // (16 * num_threads)
    before, after, _ = kernel.asm["sass"].split("ACQBULK")
    assert len(re.findall(r"LDG\.E\.128", before)) == num_loads
    # The two tiles again, for the token's own position, and then the query.
    loads = re.findall(r"(LDG\.E\.128|HADD2|PRMT|HMMA|HFMA2\.BF16|BAR\.SYNC)", after)
    assert loads[: num_loads + 1] == ["LDG.E.128"] * (num_loads + 1)
    assert num_registers(kernel) <= 168


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9, 16])
@pytest.mark.parametrize("widths", [(12288, 4096), (6144, 4096), (1728, 576), (48, 16)], ids=str)
def test_what_stands_before_attention_in_a_chain_lets_it_start_late(num_rows: int, widths: tuple[int, int]) -> None:
    """The product that norms, which makes queries, keys and values, triggers after its own wait: see `paged_attention`."""
    assert tuned(num_rows, *widths, is_gated=False, is_normed=True).triggers_late


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8, 32, 40, 71, 300])
def test_splits_fill_the_grid(num_kv_heads: int) -> None:
    """There are no more splits than fill the grid, at most 16, whatever the context."""
    for num_rows in range(1, 65):
        for is_grouped, wanted in ((True, FULL_GRID), (False, LANE_GRID)):
            num_programs = num_rows * num_kv_heads
            if num_programs >= FULL_GRID:
                continue
            counts = {
                split_count(num_rows, num_kv_heads, is_grouped=is_grouped, max_context=context)
                for context in (16, 4096, 1 << 20)
            }
            assert len(counts) == 1
            num_splits = counts.pop()
            assert num_splits > 1
            assert num_splits == MAX_SPLITS or num_programs * num_splits >= wanted
            assert num_programs * num_splits < 2 * wanted


@pytest.mark.parametrize(("num_rows", "num_kv_heads"), [(8, 32), (64, 32), (32, 8)])
def test_a_full_grid_is_split_for_long_rows_only(num_rows: int, num_kv_heads: int) -> None:
    """By what it can have at most: not up to LONG_SHARE keys, then so that shares are no longer, up to LONG_SPLITS."""
    for is_grouped in (False, True):

        def count(max_context: int, *, is_grouped: bool = is_grouped) -> int:
            return split_count(num_rows, num_kv_heads, is_grouped=is_grouped, max_context=max_context)

        assert count(16) == count(LONG_SHARE) == 1
        assert count(LONG_SHARE + 1) == count(2 * LONG_SHARE) == 2
        assert count(1 << 20) == LONG_SPLITS


def test_a_window_bounds_how_long_a_row_is() -> None:
    """A layer that sees few keys is not split in a full grid, beside one of the same step that sees all."""
    rows = DeviceRows(
        block_tables=torch.zeros(64, 1024, dtype=torch.int32),
        context_lens=torch.zeros(64, dtype=torch.int32),
        query_starts=torch.zeros(65, dtype=torch.int32),
        num_tokens=64,
        block_size=16,
    )
    assert rows.num_splits(8, 32, None) == LONG_SPLITS
    assert rows.num_splits(8, 32, 512) == 1
    scratch = rows.scratch(32, LONG_SPLITS, 128)
    assert scratch is not None
    assert scratch.sums.shape == (64, 32, LONG_SPLITS, 128)
    assert rows.scratch(32, LONG_SPLITS, 128) is scratch
    assert rows.scratch(32, 1, 128) is None
