"""The chain that tunings are measured in, where there is no GPU: its kernels are those that a decoder launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config
from triton.runtime.errors import OutOfResources  # type: ignore[import-untyped]  # it comes without types

from hotgraph_server.kernels import few_rows, tuner_gpu
from hotgraph_server.kernels.few_rows_cuts import ROW_CLASSES
from hotgraph_server.kernels.few_rows_triton import few_rows_linear_triton, few_rows_qkv_triton
from hotgraph_server.kernels.tuner_gpu import Chain, GpuBench
from hotgraph_server.models import few_rows_layers, layers
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.few_rows_layers import chain_shape
from hotgraph_server.models.shape import DecoderShape
from tests.server.kernels.chains import LLAMA_7B, TINY
from tests.server.kernels.compiler import compile_launches
from tests.server.models.driver import Driver, random_model, random_tokens

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "rope in the product": LlamaConfig(**SIZES, hidden_act="gelu"),
    "heads that are normed": Qwen3Config(**SIZES, head_dim=16),
}


@pytest.mark.parametrize("num_rows", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_its_kernels_are_those_of_a_decoder(name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of as many rows launches the same compiled kernels as often, so that what is measured is what will run."""
    monkeypatch.setattr(few_rows_layers, "few_rows_linear", few_rows_linear_triton)
    monkeypatch.setattr(few_rows_layers, "few_rows_qkv", few_rows_qkv_triton)
    monkeypatch.setattr(layers, "has_pdl", lambda device: True)
    config = deepcopy(CONFIGS[name])
    weights = random_model(config).state_dict()
    decoder = Decoder.from_config(config, weights, dtype=torch.float16, device=CPU, fuses_few_rows=True)
    driver = Driver(decoder)
    kernels = compile_launches(monkeypatch)
    driver.step({f"row {row}": random_tokens(1, 160, seed=row) for row in range(num_rows)})
    launched = Counter(kernel.hash for kernel in kernels)
    kernels.clear()
    shape = chain_shape(DecoderShape.from_config(config), torch.float16, num_turned=16)
    assert shape.fuses_rope == (name == "rope in the product")
    chain = Chain(shape, CPU, num_layers=shape.num_layers)
    chain.resize(num_rows)
    chain.run(dict.fromkeys(shape.products))
    assert Counter(kernel.hash for kernel in kernels) == launched
    assert len(launched) > 3


def test_the_definition_it_is_held_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch is expected to give is what the definition gives of the chain's own tensors, which stay as they are."""
    chain = Chain(TINY, CPU, num_layers=1)
    for num_rows in (1, 5):
        chain.resize(num_rows)
        chain.redraw()
        chain.norm.uniform_()
        chain.cache.normal_()
        for weights in chain.weights.values():
            weights[0].normal_(std=weights[0].shape[1] ** -0.5)
        for name in TINY.products:
            tensors = (chain.hidden, chain.attended, chain.gated, chain.cache)
            before = [tensor.clone() for tensor in tensors]
            wanted, cache = chain.expected(name)
            assert all(torch.equal(old, tensor) for old, tensor in zip(before, tensors, strict=True))
            # On the CPU the public functions are the definition; the launches go to those for a GPU.
            with monkeypatch.context() as patch:
                patch.setattr("hotgraph_server.kernels.tuner_gpu.few_rows_linear_triton", few_rows.few_rows_linear)
                patch.setattr("hotgraph_server.kernels.tuner_gpu.few_rows_qkv_triton", few_rows.few_rows_qkv)
                found = chain.launch(name, 0, None)
            assert wanted.isfinite().all()
            assert torch.equal(found.to(wanted.dtype), wanted)
            assert torch.equal(chain.cache, cache)
            assert (name == "qkv") == (not torch.equal(chain.cache, before[3]))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> GpuBench:
    """With weights on the CPU, where the definition stands in for the kernels, and a clock that counts launches."""
    place = "hotgraph_server.kernels.tuner_gpu"
    launches: list[str] = []

    def counted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def launch(*arguments: Any, **options: Any) -> torch.Tensor:
            launches.append("")
            return function(*arguments, **options)

        return launch

    def count(run: Callable[[], None], device: torch.device) -> float:
        launches.clear()
        run()
        return float(len(launches))

    monkeypatch.setattr(f"{place}.few_rows_linear_triton", counted(few_rows.few_rows_linear))
    monkeypatch.setattr(f"{place}.few_rows_qkv_triton", counted(few_rows.few_rows_qkv))
    monkeypatch.setattr(f"{place}.graph_seconds", count)
    bench = GpuBench(TINY, CPU)
    with torch.inference_mode():
        bench._chain.norm.uniform_()
        for weights in bench._chain.weights.values():
            for weight in weights:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return bench


def test_what_is_timed(bench: GpuBench) -> None:
    """The chain is all layers of a small model and its head; a product alone is one launch of many."""
    for rows in ROW_CLASSES:
        rule = {name: product.rule(rows) for name, product in TINY.products.items()}
        assert bench.chain_seconds(rows, rule) == 4 * bench.num_layers + 1 == 13.0
        for name, cut in rule.items():
            assert bench.product_seconds(rows, name, cut) == 1.0


def test_large_models_are_cut_short() -> None:
    """A chain has as many layers as the time of a graph needs, and never one alone that a cache may hold."""
    assert tuner_gpu.num_chain_layers(LLAMA_7B) == 6
    assert tuner_gpu.num_chain_layers(TINY) == 3
    assert tuner_gpu.num_chain_layers(replace(LLAMA_7B, hidden_size=65536, intermediate_size=65536)) == 2


def test_what_agrees(bench: GpuBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition does; what is a little off, not written, or written in the wrong place does not."""
    place = "hotgraph_server.kernels.tuner_gpu"
    for rows in ROW_CLASSES:
        for name, product in TINY.products.items():
            assert bench.agrees(rows, name, product.rule(rows))
    rule = {name: product.rule(8) for name, product in TINY.products.items()}

    def weaker(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return few_rows.few_rows_linear(x * 0.99, *arguments, **options)

    def idle(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, **options: Any) -> torch.Tensor:
        return out

    def misplaced(x: Any, weight: Any, rope: Any, slots: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        return few_rows.few_rows_qkv(x, weight, rope, slots + 1, *others, **options)

    monkeypatch.setattr(f"{place}.few_rows_linear_triton", weaker)
    assert not any(bench.agrees(8, name, rule[name]) for name in ("output", "down"))
    monkeypatch.setattr(f"{place}.few_rows_linear_triton", idle)
    assert not any(bench.agrees(8, name, rule[name]) for name in ("output", "gate_up", "down", "head"))
    assert bench.agrees(8, "qkv", rule["qkv"])
    monkeypatch.setattr(f"{place}.few_rows_qkv_triton", misplaced)
    assert not bench.agrees(8, "qkv", rule["qkv"])


def test_what_does_not_fit_the_gpu_takes_for_ever(bench: GpuBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that wants more than there is ends no run: its time is infinite."""

    def large(*arguments: Any, **options: Any) -> torch.Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr("hotgraph_server.kernels.tuner_gpu.few_rows_linear_triton", large)
    assert bench.chain_seconds(1, {name: product.rule(1) for name, product in TINY.products.items()}) == float("inf")
