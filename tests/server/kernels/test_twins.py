"""The Triton kernels where there is no GPU: interpreted they give what torch gives, and they compile for one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hotgraph_server.kernels.activation import gated_activation_triton
from hotgraph_server.kernels.norm import add_rms_norm_triton, rms_norm_triton
from hotgraph_server.kernels.prepare import prepare_step_triton
from hotgraph_server.kernels.prepare_stage import StageLayout
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.rope_kv import rope_and_write_kv_triton
from tests.server.kernels.compiler import compile_launches, spills
from tests.server.kernels.interpreter import run_interpreted
from tests.server.kernels.prepare_steps import NUM_PARAMETERS, random_step

Launch = Callable[[int], object]


def test_interpreted_kernels_give_what_torch_gives() -> None:
    """Every check of `interpreted_twins.py` holds."""
    run_interpreted(Path(__file__).with_name("interpreted_twins.py"))


def norm(size: int, dtype: torch.dtype) -> Launch:
    return lambda num_tokens: rms_norm_triton(
        torch.ones(num_tokens, size, dtype=dtype), torch.ones(size).to(dtype), 1e-5
    )


def add_norm(size: int, dtype: torch.dtype) -> Launch:
    def launch(num_tokens: int) -> object:
        x = torch.ones(num_tokens, size, dtype=dtype)
        return add_rms_norm_triton(x, x, x[0], 1e-5)

    return launch


def activation(name: str, dtype: torch.dtype) -> Launch:
    return lambda num_tokens: gated_activation_triton(torch.ones(num_tokens, 22016, dtype=dtype), name)


def rope_kv(
    num_heads: int, num_kv_heads: int, head_dim: int, num_turned: int, dtype: torch.dtype, *, has_norm: bool
) -> Launch:
    def launch(num_tokens: int) -> object:
        indices = torch.zeros(num_tokens, dtype=torch.int64)
        cache = torch.ones(2, 16, num_kv_heads, head_dim, dtype=dtype)
        return rope_and_write_kv_triton(
            torch.ones(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype),
            RopePlan(torch.ones(10, num_turned), indices, None),
            indices,
            cache,
            cache,
            query_key_norm=torch.ones(num_heads + num_kv_heads, head_dim, dtype=dtype) if has_norm else None,
            epsilon=1e-5,
        )

    return launch


def prepare(num_rows: int) -> None:
    # One engine's: its rings and tables have one size, whatever the step's.
    step = random_step(random.Random(num_rows), min_rows=num_rows, max_rows=num_rows, max_blocks=256)
    layout = StageLayout(128, 2048, 256, NUM_PARAMETERS)
    source = replace(step.source, layout=layout, stages=torch.zeros(5, layout.num_words, dtype=torch.int32))
    prepare_step_triton(source, **step.results, block_size=16)


LAUNCHES: dict[str, Launch] = {
    "norm of 4096": norm(4096, torch.float16),
    "sum and norm of 4096": add_norm(4096, torch.bfloat16),
    "sum and norm of 5000 in float32": add_norm(5000, torch.float32),
    "silu": activation("silu", torch.float16),
    "gelu": activation("gelu", torch.bfloat16),
    "gelu_pytorch_tanh": activation("gelu_pytorch_tanh", torch.float32),
    "relu": activation("relu", torch.float16),
    "heads of 128": rope_kv(32, 32, 128, 128, torch.float16, has_norm=False),
    "normed heads of 128 in groups": rope_kv(32, 8, 128, 128, torch.bfloat16, has_norm=True),
    "partly turned, normed heads of 96 in float32": rope_kv(32, 32, 96, 72, torch.float32, has_norm=True),
    "prepare": prepare,
}


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_one_compiled_kernel_serves_every_step(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an H200 each kernel compiles without running out of registers, and tokens and rows choose no other variant."""
    kernels = compile_launches(monkeypatch)
    for num_tokens in (1, 2, 16, 100):
        launch(num_tokens)
    assert len(kernels) == 4
    assert len({kernel.hash for kernel in kernels}) == 1
    assert not spills(kernels[0])
