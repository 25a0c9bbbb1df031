"""Results that nobody measured, for tests of tables and pictures: steps of made-up kernels, and the JSON around them."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch

from benchmarks.gpu import breakdown
from benchmarks.gpu.floor import Rates, Sizes, StepShape, floor_cell
from benchmarks.gpu.trace import Span

Layer = list[tuple[str, str]]  # kernels in their order, with their roles

ONE_TOKEN_LAYER: Layer = [
    ("sums_kernel", "qkv"),
    ("decode_kernel", "attention"),
    ("sums_kernel", "output"),
    ("sums_kernel", "gate_up"),
    ("sums_kernel", "down"),
]
PROMPT_LAYER: Layer = [
    ("_rms_norm_kernel", "norm"),
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "qkv"),
    ("_rope_kv_kernel", "rope"),
    ("tile_kernel", "attention"),
    ("nvjet_hsh_64x128_64x8_2x1_v_bz_NTN", "output"),
    ("cublasLt::splitKreduce_kernel", "output"),
    ("_rms_norm_kernel", "norm"),
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "gate_up"),
    ("_gated_activation_kernel", "activation"),
    ("nvjet_hsh_64x128_64x8_2x1_v_bz_NTN", "down"),
    ("cublasLt::splitKreduce_kernel", "down"),
]
ENVIRONMENT = {"packages": dict.fromkeys(("torch", "triton", "transformers"), "0"), "gpu": "made up", "commit": "0"}


def step_names(layer: Layer, num_layers: int) -> Layer:
    """A step's kernels with their roles."""
    before = [("_prepare_kernel", "prepare"), ("vectorized_gather_kernel", "embedding")]
    after = [("sums_kernel", "head"), ("_blocks_kernel", "sampler"), ("_finish_kernel", "sampler")]
    return [*before, *itertools.chain.from_iterable([layer] * num_layers), *after]


def made_up_steps(layer: Layer, num_layers: int, num_steps: int, mean_us: float = 18.0) -> list[list[Span]]:
    """Steps whose kernels take random times, and mostly begin before the one in front of them ends."""
    source = random.Random(num_steps)
    steps = []
    reached = 1e6
    for _ in range(num_steps):
        step: list[Span] = []
        for name, role in step_names(layer, num_layers):
            factor = {"gate_up": 2.0, "head": 3.0, "attention": 0.3, "output": 0.5}.get(
                role, 1.0 if role in ("qkv", "down") else 0.1
            )
            begin = reached - source.uniform(-0.2, 1.5) if step else reached + 2
            length = factor * mean_us * source.uniform(0.9, 1.1) + 1.5
            step.append(Span(name, begin, begin + length))
            reached = begin + length
        steps.append(step)
    return steps


def made_up_rates() -> dict[str, Any]:
    """As of `measure_rates`."""
    rates = {"copy": 4.2e12, "read": 4.5e12, "product": 7e14}
    found: dict[str, Any] = {
        name: {"amount": 1, "per_second": value, "samples_seconds": [1 / value], "samples_every": 1}
        for name, value in rates.items()
    }
    found["product"]["what"] = "8192 x 8192 x 8192, float16"
    return found


def part_of(seconds: float) -> dict[str, Any]:
    """As of `summary_of`, of one sample."""
    return {"samples_seconds": [seconds], "summary": {"p50": seconds, "p99": seconds}}


def result_of(name: str, config: str, results: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """As of `Report.to_dict`."""
    everything = {"config": config, "device": "cuda", "dtype": None, **settings}
    return {"name": name, "settings": everything, "environment": ENVIRONMENT, "checks": [], "results": results}


def made_up_breakdown(config: str) -> dict[str, Any]:
    """A result of `benchmarks.gpu.breakdown`: a decode step and a long prompt."""
    sizes, measured = Sizes.of(config, torch.float16), made_up_rates()
    steps = {}
    for name, shape, layer, mean_us in (
        ("decode, batch 1", StepShape.decode(1, 256), ONE_TOKEN_LAYER, 18.0),
        ("decode, batch 64", StepShape.decode(64, 256), ONE_TOKEN_LAYER, 30.0),
        ("prompt of 512", StepShape.prompt(512), PROMPT_LAYER, 70.0),
    ):
        table = breakdown.table_of(
            made_up_steps(layer, sizes.num_layers, 4, mean_us), sizes, shape, keeps_timeline=name == "decode, batch 1"
        )
        steps[name] = {
            "graph": {"name": "t1-r1-greedy", "num_nodes": 162, "num_edges": 161, "num_programmatic_edges": 161},
            "rows": [list(row) for row in shape.rows],
            "device": part_of(table["traced"]["summary"]["p50"]),
            **floor_cell(sizes, shape, Rates.of(measured)),
            **table,
        }
    return result_of("breakdown", config, {"rates": measured, "steps": steps})
