"""Compiling candidates beside each other where there is no GPU: what is ready, what is left aside, and when time is up."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from hotgraph_server.kernels.few_rows_cuts import Tuning
from hotgraph_server.kernels.tuner_compile import CompilePool, Target
from tests.server.kernels.chains import TINY

HOPPER: Target = ("cuda", 90, 32)
NAMES = ("qkv", "output")
PATIENCE_SECONDS = 120.0


def test_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels land in Triton's cache; what cannot be compiled, or not in time, is left aside, but for each product's first."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rules: dict[str, Tuning] = {name: TINY.products[name].rule(8) for name in NAMES}
    others: dict[str, Tuning] = {name: replace(rule, num_warps=4) for name, rule in rules.items()}
    broken = replace(others["output"], block_rows=24)  # no power of two
    reports: list[tuple[str, int, int]] = []
    with CompilePool(TINY, HOPPER, num_processes=1) as pool:
        ready = pool.compiled(
            {8: {"qkv": [rules["qkv"], others["qkv"]], "output": [rules["output"], others["output"], broken]}},
            time.monotonic() + PATIENCE_SECONDS,
            lambda *report: reports.append(report),
        )
        assert ready == {8: {name: [rules[name], others[name]] for name in NAMES}}
        assert reports[-1] == ("compiling", 5, 5)
        assert "1 tunings cannot be compiled" in caplog.text
        assert "block_rows=24" in caplog.text
        found = [path.name for path in tmp_path.rglob("*.cubin")]
        assert sorted(set(found)) == ["dots_kernel.cubin", "norm_kernel.cubin"]
        assert found.count("dots_kernel.cubin") == 4
        # A time that is over leaves each product what it has without being told.
        late = {8: {"qkv": [rules["qkv"], replace(rules["qkv"], ahead=1)]}}
        assert pool.compiled(late, time.monotonic() - 1.0, lambda *report: None) == {8: {"qkv": [rules["qkv"]]}}


class _Deadly:
    """Ends the process that is sent it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def test_processes_that_die_leave_the_rule(caplog: pytest.LogCaptureFixture) -> None:
    """When they are killed, for want of memory perhaps, there is nothing to try, now and later, and the log says why."""
    cut = TINY.products["qkv"].rule(1)
    with CompilePool(TINY, cast(Target, (_Deadly(),)), num_processes=1) as pool:
        for _ in range(2):
            caplog.clear()
            until = time.monotonic() + PATIENCE_SECONDS
            ready = pool.compiled({1: {"qkv": [cut, replace(cut, block_rows=8)]}}, until, lambda *report: None)
            assert ready == {1: {"qkv": [cut]}}
            assert "2 tunings cannot be compiled" in caplog.text
            assert "BrokenProcessPool" in caplog.text
