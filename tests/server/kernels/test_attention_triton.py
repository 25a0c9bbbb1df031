"""The attention kernels where there is no GPU: interpreted they give what the definition gives, and they compile for one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hotgraph_server.kernels.attention_cuts import FULL_GRID
from hotgraph_server.kernels.attention_rows import DeviceRows
from hotgraph_server.kernels.attention_triton import launches, triton_attention
from hotgraph_server.kernels.few_rows_cuts import tuned
from tests.server.kernels.before_wait import before_wait
from tests.server.kernels.compiler import compile_launches, num_joined_with_shuffled, spills
from tests.server.kernels.interpreter import run_interpreted


def rows_of(num_tokens: int, num_rows: int, max_blocks: int) -> DeviceRows:
    return DeviceRows(
        block_tables=torch.zeros(num_rows, max_blocks, dtype=torch.int32),
        context_lens=torch.zeros(num_rows, dtype=torch.int32),
        query_starts=torch.zeros(num_rows + 1, dtype=torch.int32),
        num_tokens=num_tokens,
        block_size=16,
    )


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
    rows = rows_of(num_tokens, num_rows, max_blocks)
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
    """For sm_90 all kernels compile in 16 bits: decode with splits and without, tiles; nothing spills.

    And what all threads of a warp add up is the same in all of them.
    """
    kernels = compile_launches(monkeypatch)
    attend(1, 1, heads, head_dim, pdl=True)
    attend(4, 4, heads, head_dim, pdl=True)
    attend(64, 64, heads, head_dim, pdl=True)
    attend(64, 64, heads, head_dim, max_blocks=1024, pdl=True)
    attend(64, 1, heads, head_dim)
    assert [kernel.name for kernel in kernels] == ["decode_kernel"] * 4 + ["tile_kernel"]
    assert not any(map(spills, kernels))
    assert not any(map(num_joined_with_shuffled, kernels))


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
    assert not any(map(num_joined_with_shuffled, kernels))


@pytest.mark.parametrize("max_blocks", [8, 1024], ids=["short rows", "long rows"])
def test_no_shape_of_a_step_needs_a_kernel_of_its_own(max_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer's two kernels there are three variants, however many tokens, rows, splits or keys seen a step has."""
    kernels = compile_launches(monkeypatch)
    for num_tokens in (*range(1, 9), 16, 17, 31, 32, 40, 63, 64, 100, 128, 200, 256):
        attend(num_tokens, num_tokens, (8, 8), 64, max_blocks=max_blocks)
    for num_rows in (1, 2, 3, 16):
        for num_tokens in (17, 32, 100, 512):
            attend(num_tokens, num_rows, (8, 8), 64, max_blocks=max_blocks)
    for window in (1, 16, 100):
        attend(32, 16, (8, 8), 64, max_blocks=max_blocks, window=window)
    assert len({id(kernel) for kernel in kernels}) == 3


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
            # Tables, keys and values stand before the wait, no query and no scratch; nothing is written there.
            early = before_wait(kernel)
            assert {"context_lens", "block_tables", "keys", "values"} <= set(early.reads)
            assert set(early.reads) <= {"context_lens", "query_starts", "block_tables", "keys", "values"}
            assert not early.writes
            before, after, left = machine_code.split("ACQBULK")
            assert not re.search(r"\b(STG|RED|ATOMG?|STL)\b", before)
            assert "STG" in after
            assert not re.search(r"\b(LDG|STG|RED|ATOMG?)\b", left)


@pytest.mark.parametrize(
    ("heads", "num_rows", "dtype", "head_dim"),
    [
        ((32, 32), 1, torch.float16, 128),
        ((32, 32), 4, torch.float16, 128),
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
    tile_keys = 16 if num_rows == 4 else 32
    num_loads = 2 * 2 * tile_keys * head_dim * 2 // (16 * num_threads)
    early = before_wait(kernel).reads
    assert early["keys"] == early["values"] == num_loads // 2
    assert "query" not in early
    before, after, _ = kernel.asm["sass"].split("ACQBULK")
    assert len(re.findall(r"LDG\.E\.128", before)) == num_loads
    # The two tiles again, for the token's own position, and then the query.
    loads = re.findall(r"(LDG\.E\.128|HADD2|PRMT|HMMA|HFMA2\.BF16|BAR\.SYNC)", after)
    assert loads[: num_loads + 1] == ["LDG.E.128"] * (num_loads + 1)
    num_together = 8 if tile_keys == 16 else 4 if heads[0] == heads[1] else 3
    assert -(-num_registers(kernel) // 8) * 8 * num_threads * num_together <= 65536


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9, 16])
@pytest.mark.parametrize("widths", [(12288, 4096), (6144, 4096), (1728, 576), (48, 16)], ids=str)
def test_what_stands_before_attention_in_a_chain_lets_it_start_late(num_rows: int, widths: tuple[int, int]) -> None:
    """The product that norms, which makes queries, keys and values, triggers after its own wait: see `paged_attention`."""
    assert tuned(num_rows, *widths, is_gated=False, is_normed=True).triggers_late


@pytest.mark.parametrize(
    ("num_rows", "heads", "wanted"),
    [
        (1, (32, 32), (16, 32, 2)),
        (2, (32, 32), (16, 16, 2)),
        (4, (32, 32), (8, 16, 2)),
        (8, (32, 32), (2, 32, 2)),
        (64, (32, 32), (1, 32, 2)),
        (1, (32, 8), (32, 32, 4)),
        (2, (32, 8), (16, 32, 4)),
        (8, (32, 8), (8, 64, 4)),
        (64, (32, 8), (1, 64, 4)),
    ],
    ids=str,
)
def test_what_was_measured_is_taken(num_rows: int, heads: tuple[int, int], wanted: tuple[int, int, int]) -> None:
    """For the sizes that were timed on an H200: splits of each row, keys of a tile, and warps."""
    query = torch.ones(num_rows, heads[0], 128, dtype=torch.float16)
    cache = torch.ones(1, 16, heads[1], 128, dtype=torch.float16)
    arguments: dict[str, Any] = {"scaling": 1.0, "window": None, "softcap": None, "sinks": None}
    (launch,) = launches(query, cache, cache, rows_of(num_rows, num_rows, 256), torch.empty_like(query), **arguments)
    found = (1 << launch.arguments["even_bits"], launch.arguments["tile_keys"], launch.arguments["num_warps"])
    assert found == wanted
    assert launch.grid[:2] == (num_rows, heads[1])
    assert launch.grid[2] >= wanted[0]
    assert FULL_GRID == 256


def test_a_window_bounds_how_long_a_row_is() -> None:
    """A layer that sees few keys has no programs for long rows, beside one of the same step that sees all; and the scratch."""
    rows = rows_of(64, 64, 1024)
    query = torch.ones(64, 32, 128, dtype=torch.float16)
    cache = torch.ones(1, 16, 32, 128, dtype=torch.float16)

    def planned(window: int | None) -> Any:
        (launch,) = launches(
            query, cache, cache, rows, torch.empty_like(query), scaling=1.0, window=window, softcap=None, sinks=None
        )
        return launch

    assert planned(512).grid == (64, 32, 1)
    whole = planned(None)
    assert whole.grid[2] > 1
    num_splits = 1 << whole.arguments["split_bits"]
    assert num_splits == 16
    assert whole.arguments["sums"].shape == (64, 32, num_splits, 128)
    assert planned(None).arguments["sums"] is whole.arguments["sums"]
