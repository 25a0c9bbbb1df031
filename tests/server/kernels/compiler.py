"""Compiles Triton kernels for an H100 or H200 where there is no GPU: what is launched is compiled instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]  # it comes without types
from triton.runtime.driver import driver  # type: ignore[import-untyped]  # as above
from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]  # as above


class _Hopper:
    """The little that Triton asks of a driver before it launches. Its device is not one that tests on a GPU could mean."""

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)


def compile_launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """From now on launches compile, with the tensors they are given wherever these are; the list gets the compiled kernels."""
    kernels: list[Any] = []

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*arguments: object, **options: object) -> None:
            kernels.append(kernel.warmup(*arguments, grid=grid, **options))

        return compile_only

    monkeypatch.setattr(driver, "_active", _Hopper())
    monkeypatch.setattr(JITFunction, "__getitem__", launcher)
    return kernels


def num_loads_before_wait(kernel: Any) -> int:
    """Loads from global memory that stand before the first wait in what the GPU runs: the assembler may order them anew."""
    before, _, _ = kernel.asm["sass"].partition("ACQBULK")
    return len(re.findall(r"\b(?:LDG|UTMALDG)\b", before))


def num_spills(kernel: Any) -> int:
    """Stores to local memory and loads from it, which a compiled kernel has when registers run out."""
    machine_code = kernel.asm["sass"]
    assert "EXIT" in machine_code
    return len(re.findall(r"\b(?:STL|LDL)\b", machine_code))


def spills(kernel: Any) -> bool:
    """Whether a compiled kernel keeps anything in local memory."""
    return num_spills(kernel) > 0


def num_joined_with_shuffled(kernel: Any) -> int:
    """Products whose rounding was left out where a neighbour's number is added to them (PTX `fma` of a `shfl.bfly`).

    Of a sum that all threads of a warp are to hold, each would have its own product unrounded and the others' rounded, so that
    copies differ from thread to thread.
    """
    shuffled: set[str] = set()
    found = 0
    for line in kernel.asm["ptx"].splitlines():
        if shuffle := re.match(r"\s*shfl\.sync\.bfly\S*\s+(%\w+)", line):
            shuffled.add(shuffle[1])
        elif move := re.match(r"\s*mov\.b32\s+(%\w+), (%\w+);", line):
            if move[2] in shuffled:
                shuffled.add(move[1])
        elif joined := re.match(r"\s*fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", line):
            found += joined[1] in shuffled
    return found
