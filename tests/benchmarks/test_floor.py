"""What a step must move and compute, counted in another way than the program counts it; and the rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tables
from benchmarks.gpu import floor
from benchmarks.gpu.floor import ROLES, Rates, Sizes, StepShape, Work, role_work, step_work
from benchmarks.gpu.models import SHAPES, Loaded, RandomWeights

RATES = Rates(copy_bytes=4e12, read_bytes=4.4e12, product_flops=7e14)


@pytest.mark.parametrize("name", list(SHAPES))
def test_weights_of_a_step_are_those_of_the_model(name: str) -> None:
    """A decode step reads every weight once, but of the embedding only the rows of its tokens."""
    sizes = Sizes.of(name, torch.float16)
    weights = RandomWeights(SHAPES[name], dtype=torch.float16, device=torch.device("cpu")).sizes
    embedding = weights["model.embed_tokens.weight"].numel()
    others = sum(size.numel() for weight, size in weights.items() if weight != "model.embed_tokens.weight")
    if "lm_head.weight" not in weights:
        others += embedding  # tied: the head reads all of it
    for batch in (1, 7):
        found = step_work(sizes, StepShape.decode(batch, 100)).weight_bytes
        assert found == 2 * (others + batch * sizes.hidden_size)


def test_kv_bytes_are_those_of_the_cache(tiny: Loaded) -> None:
    """What a token holds in the model's own layout is written for each new token and read for each earlier one."""
    sizes = Sizes.of("tiny", torch.float32)
    token_bytes = sum(4 * layer.num_heads * (layer.key_dim + layer.value_dim) for layer in tiny.model.kv_layout)
    work = step_work(sizes, StepShape(((30, 5), (7, 1), (0, 12))))
    assert work.kv_read_bytes == 37 * token_bytes
    assert work.kv_write_bytes == 18 * token_bytes


def test_flops_are_those_that_torch_counts(tiny: Loaded) -> None:
    """Products are counted as by multiplying matrices of those sizes; attention by pairs of tokens that see each other."""
    sizes = Sizes.of("tiny", torch.float32)
    tokens, context = 9, 14
    step = StepShape(((context, tokens),))
    pairs = sum(context + index + 1 for index in range(tokens))
    hidden, inner, query, kv = 64, 128, 64, 2 * 2 * 16
    early = 2 * 2 * tokens * hidden * (query + kv)  # both layers
    late = 2 * (tokens + 1) * (query * hidden + 3 * hidden * inner)  # the last layer's last token alone
    expected = early + late + 2 * hidden * 512 + 2 * 4 * query * pairs
    assert step_work(sizes, step).flops == expected
    assert tiny.model.vocabulary_size == 512


def test_roles_add_up_to_the_step() -> None:
    """Every role has bytes, and the step is the sum of those that every step has; others add no weight and no KV."""
    sizes = Sizes.of("llama3-8b", torch.bfloat16)
    step = StepShape.decode(8, 1000)
    found = role_work(sizes, step)
    assert all(work.all_bytes > 0 for work in found.values())
    total = step_work(sizes, step)
    assert total.all_bytes == sum(found[role].all_bytes for role in ROLES)
    assert all(found[role].memory_bytes == 0 for role in floor.EXTRA_ROLES)
    assert total.memory_bytes + total.activation_bytes + total.logits_bytes == total.all_bytes


def test_a_floor_is_the_slower_of_bytes_and_flops() -> None:
    """A 7B decode step is bound by its 13.2 GB of weights and its KV, a long prompt by its products."""
    sizes = Sizes.of("llama2-7b", torch.float16)
    decode = floor.floor_cell(sizes, StepShape.decode(1, 256), RATES)
    assert decode["bound"] == "memory"
    kv_bytes = 257 * 32 * 2 * 4096 * 2
    assert decode["floor_seconds"] == pytest.approx((13.2147e9 + kv_bytes) / 4e12, rel=1e-4)
    prompt = floor.floor_cell(sizes, StepShape.prompt(2048), RATES)
    assert prompt["bound"] == "products"
    assert prompt["floor_seconds"] == pytest.approx(step_work(sizes, StepShape.prompt(2048)).flops / 7e14)
    seconds = [
        floor.floor_seconds(step_work(sizes, StepShape.decode(batch, 256)), RATES) for batch in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert seconds == sorted(seconds)
    assert floor.floor_seconds(Work(), RATES) == 0


def test_rates_and_floors(small: Sequence[str], tmp_path: Path) -> None:
    """The program measures, writes samples, and its tables have every batch and prompt."""
    out = tmp_path / "floor.json"
    assert floor.main([*small, "--batches", "1,4", "--prompts", "10,64", "--out", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    for name in ("copy", "read", "product"):
        rate = result["results"]["rates"][name]
        assert len(rate["samples_seconds"]) == floor.RATE_SAMPLES
        assert rate["per_second"] == pytest.approx(rate["amount"] / rate["summary"]["p50"], rel=0.01)
    text = tables.tables(result)
    for name in ("| 4 |", "| 64 |", "Measured in the same run: copy"):
        assert name in text


def test_shares_of_a_latency_result() -> None:
    """A cell's floor is that of its prompt, or of its batch at the context of the middle; its share is of the p50."""
    part = {"samples_seconds": [0.004], "summary": {"p50": 0.004, "p99": 0.005}}
    result = {
        "settings": {"config": "llama2-7b", "device": "cuda", "dtype": None, "batch_prompt": 192, "batch_tokens": 128},
        "results": {"gRPC": {"ttft": {"100": part}, "tpot": {"8": {"tpot": part}}}},
    }
    cells = floor.latency_cells(result, RATES)
    assert list(cells) == ["gRPC TTFT", "gRPC TPOT"]
    sizes = Sizes.of("llama2-7b", torch.float16)
    expected = floor.floor_seconds(step_work(sizes, StepShape.decode(8, 256)), RATES)
    assert cells["gRPC TPOT"]["8"] == {"seconds": 0.004, "floor_seconds": expected, "share": expected / 0.004}
    assert cells["gRPC TTFT"]["100"]["floor_seconds"] == pytest.approx(13.268e9 / 4e12, rel=1e-3)
