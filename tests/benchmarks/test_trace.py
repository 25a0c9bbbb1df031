"""Traces of made-up steps: whole steps, roles of kernels, overlaps, and what the breakdown makes of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tables
from benchmarks.gpu import breakdown, trace
from benchmarks.gpu.floor import Rates, Sizes, StepShape, role_work
from benchmarks.gpu.trace import Span
from hotgraph_server.batch import Sampler, StepKey
from tests.benchmarks.made_up import ONE_TOKEN_LAYER, PROMPT_LAYER, made_up_breakdown, made_up_steps, step_names


def test_whole_steps_leave_the_ends_of_a_trace_out() -> None:
    """What stands before the first end and after the last is of no whole step; a trace from the start has the first, too."""
    names = ["b", "_finish_kernel", "a", "b", "_finish_kernel", "a", "b", "_write_ring_kernel", "a"]
    spans = [Span(name, 10.0 * index, 10.0 * index + 8) for index, name in enumerate(names)]
    assert [[span.name for span in step] for step in trace.whole_steps(spans)] == [
        ["a", "b", "_finish_kernel"],
        ["a", "b", "_write_ring_kernel"],
    ]
    assert [len(step) for step in trace.lone_steps(spans)] == [2, 3, 3]
    assert trace.whole_steps(spans[:1]) == []


def test_names_of_kernels_tell_them_apart() -> None:
    """Namespaces and parameters go; the functor of a template stays."""
    name = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul> >(int)"
    )
    assert trace.short_name(name) == "vectorized_elementwise_kernel FillFunctor"
    assert trace.short_name("_rms_norm_kernel") == "_rms_norm_kernel"


@pytest.mark.parametrize("layer", [ONE_TOKEN_LAYER, PROMPT_LAYER])
def test_roles_come_from_the_order_of_kernels(layer: list[tuple[str, str]]) -> None:
    """Each product is known by its place, in steps of few and of many tokens; a part of a product belongs to that product."""
    names = step_names(layer, 3)
    roles = trace.roles_of([name for name, _ in names], 3)
    assert roles is not None
    assert [role for role, _ in roles] == [role for _, role in names]
    layers = [index for (role, index), (name, _) in zip(roles, names, strict=True) if trace.kind_of(name) == "product"]
    assert layers == [index for index in range(3) for _ in range(4)] + [None]
    assert [index for role, index in roles if role == "attention"] == [0, 1, 2]


def test_a_part_belongs_to_the_product_before_it() -> None:
    """Even when another kernel ran between the two, and when the count says that the next layer has begun."""
    names = [name for name, _ in step_names(PROMPT_LAYER, 2)]
    last_part = max(index for index, name in enumerate(names) if "splitK" in name)
    names.insert(last_part, "_rms_norm_kernel")
    roles = trace.roles_of(["Memset (Device)", *names], 2)
    assert roles is not None
    assert roles[0] == ("other", None)
    assert roles[last_part + 2] == ("down", 1)


def test_an_order_that_is_not_known_tells_no_roles() -> None:
    """A product too many or too few, or attention at another place, and products stand together; nothing is guessed."""
    names = [name for name, _ in step_names(ONE_TOKEN_LAYER, 2)]
    assert trace.roles_of(names, 3) is None
    assert trace.roles_of([*names, "dots_kernel"], 2) is None
    place = names.index("decode_kernel")
    moved = [*names[:place], names[place + 1], names[place], *names[place + 2 :]]
    assert trace.roles_of(moved, 2) is None
    spans = [Span(name, 2.0 * index, 2.0 * index + 1) for index, name in enumerate(moved)]
    step, is_told = trace.trace_step(spans, 2)
    assert not is_told
    assert [part.role for part in step.parts].count("products") == 9


def test_what_is_added_and_the_gaps_are_the_step() -> None:
    """With random overlaps and gaps: added times and gaps sum up to the step, and overlaps to the rest of all spans."""
    source = random.Random(3)
    spans = []
    begin = 100.0
    for _ in range(60):
        length = source.uniform(1, 9)
        spans.append(Span("k", begin, begin + length))
        begin += source.uniform(0, 10)
    step, _ = trace.trace_step(spans, 4)
    added = sum(part.added_us for part in step.parts) / 1e6
    assert added + step.gap_seconds == pytest.approx(step.seconds)
    all_spans = sum(span.end_us - span.begin_us for span in spans) / 1e6
    assert added + step.overlap_seconds == pytest.approx(all_spans)
    assert step.overlap_seconds > 0
    assert step.gap_seconds > 0


def test_a_table_has_the_work_of_each_role() -> None:
    """Calls and seconds are those of a step, and work that of the shape, for a model of as many layers as the trace has."""
    sizes = Sizes.of("tiny", torch.float16)
    shape = StepShape.decode(2, 300)
    table = breakdown.table_of(made_up_steps(ONE_TOKEN_LAYER, sizes.num_layers, 5), sizes, shape, keeps_timeline=True)
    assert table["are_roles_told"]
    assert table["num_steps"] == len(table["traced"]["samples_seconds"]) == 5
    works = role_work(sizes, shape)
    for role in ("qkv", "attention", "output", "gate_up", "down"):
        assert sum(table["roles"][role]["kernels"].values()) == sizes.num_layers
        assert table["roles"][role]["work"] == works[role].to_dict()
    seconds = sum(part["added"]["summary"]["mean"] for part in table["roles"].values())
    assert seconds + table["gaps"]["summary"]["mean"] == pytest.approx(table["traced"]["summary"]["mean"])
    assert len(table["timeline"]) == len(step_names(ONE_TOKEN_LAYER, sizes.num_layers))
    assert table["timeline"][0][3] == 0.0


def test_tables_of_a_breakdown(tmp_path: Path) -> None:
    """Rates are a role's bytes over what it adds, beside the copy of the same run; edges are told."""
    result: dict[str, Any] = made_up_breakdown("llama2-7b")
    path = tmp_path / "breakdown.json"
    path.write_text(json.dumps(result))
    text = tables.tables(json.loads(path.read_text()))
    step = result["results"]["steps"]["decode, batch 1"]
    part = step["roles"]["gate_up"]
    work = role_work(Sizes.of("llama2-7b", torch.float16), StepShape.decode(1, 256))["gate_up"]
    rate = work.all_bytes / part["added"]["summary"]["p50"]
    share = rate / Rates.of(result["results"]["rates"]).copy_bytes
    assert f"| gate_up | `sums_kernel` | 32 | {work.all_bytes / 1e6:.1f} |" in text
    assert f"| {rate / 1e12:.2f} | {share:.0%} |" in text
    assert "162 nodes, 161 of 161 edges programmatic" in text


def test_padding_is_work_of_the_graph() -> None:
    """A graph of more rows computes rows of nothing; one of more tokens a longer prompt; the right one what was asked for."""
    key = StepKey(4, 4, Sampler.GREEDY)
    assert breakdown.padded(StepShape.decode(3, 9), key).rows == ((9, 1), (9, 1), (9, 1), (0, 1))
    assert breakdown.padded(StepShape.prompt(10), StepKey(16, 1, Sampler.GREEDY)).rows == ((0, 16),)
    assert breakdown.padded(StepShape.decode(4, 9), key) == StepShape.decode(4, 9)
