"""Attention and sums of rows in one order, where there is no GPU: in the interpreter, and compiled for one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hotgraph_server.kernels.attention_rows import DeviceRows
from hotgraph_server.kernels.attention_triton import triton_attention
from hotgraph_server.kernels.row_sums import row_cumsum_triton, row_logsumexp_triton
from tests.server.kernels.before_wait import before_wait
from tests.server.kernels.compiler import compile_launches, num_spills, spills
from tests.server.kernels.interpreter import run_interpreted


def test_interpreted_kernels_give_the_same_bits() -> None:
    """Every check of `interpreted_invariant.py` holds."""
    run_interpreted(Path(__file__).with_name("interpreted_invariant.py"))


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
