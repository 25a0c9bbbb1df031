"""Layers for few tokens against those for any number, on the CPU, where each fused kernel is its plain definition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from hotgraph_server.models import few_rows_layers, layers
from hotgraph_server.models.arena import DecoderArena
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.few_rows_layers import MAX_TOKENS, FewRowsLayers
from hotgraph_server.models.shape import DecoderShape
from tests.server.models.driver import Driver, random_model, random_tokens

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 151,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama with groups, tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama with biases and gelu": lambda: LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "qwen2 with windows": lambda: Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "phi3 turned in part": lambda: Phi3Config(
        **SIZES | {"hidden_size": 96},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
}
FUSED = {"llama", "llama with groups, tied", "llama with biases and gelu", "qwen2 with windows"}
# Norm of the difference over norm, after three layers: order of sums in float32, and roundings to 11 bits.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3}


@functools.cache
def source(name: str) -> PreTrainedModel:
    return random_model(CONFIGS[name]())


def decoder(name: str, dtype: torch.dtype = torch.float32, *, fuses_few_rows: bool | None = True) -> Decoder:
    """Its weights do not fit into float16, so that they are not packed."""
    config = deepcopy(source(name).config)
    weights = source(name).state_dict()
    return Decoder.from_config(config, weights, dtype=dtype, device=CPU, fuses_few_rows=fuses_few_rows)


def arena_for(model: Decoder, name: str) -> DecoderArena:
    """Full of NaN. On the CPU the decoder makes none by itself."""
    shape = DecoderShape.from_config(CONFIGS[name]())
    arena = DecoderArena(shape, max_tokens=170, max_rows=12, dtype=model.dtype, device=CPU)
    for room in vars(arena).values():
        if isinstance(room, torch.Tensor):
            room.fill_(torch.nan)
    return arena


def prompts(num_rows: int) -> dict[str, int]:
    return {f"row {row}": 9 + 3 * row for row in range(num_rows)}


# Tokens of each row. First what puts something into the cache, then what is compared.
STEPS: dict[str, list[dict[str, int]]] = {
    **{
        f"{rows} decode rows": [prompts(rows), *[dict.fromkeys(prompts(rows), 1)] * 3] for rows in (1, 2, 3, MAX_TOKENS)
    },
    **{f"a prompt of {tokens}": [{"a": tokens}, {"a": 1}] for tokens in range(2, MAX_TOKENS + 1)},
    "chunks": [{"a": 30}, {"a": 5}, {"a": 2}, {"a": 8}],
    "mixed": [{"a": 20, "b": 40}, {"a": 1, "b": 1, "c": 6}, {"b": 1, "a": 3, "c": 4}],
}


@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 1)], ids=["whole", "padded row", "padded tokens"])
@pytest.mark.parametrize("has_arena", [False, True], ids=["without an arena", "with an arena"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_cache_are_those_of_plain_layers(
    name: str, dtype: torch.dtype, has_arena: bool, padding: tuple[int, int]
) -> None:
    """Decode rows, prompts, chunks and mixed steps of few tokens, among longer ones, give the same logits, keys and values."""
    plain, fused = decoder(name, dtype, fuses_few_rows=False), decoder(name, dtype)
    tolerance = TOLERANCES[dtype]
    for case, steps in STEPS.items():
        drivers = [
            Driver(
                model,
                num_padding_tokens=padding[0],
                num_padding_rows=padding[1],
                arena=arena_for(model, name) if has_arena else None,
            )
            for model in (plain, fused)
        ]
        for seed, step in enumerate(steps):
            chunks = {key: random_tokens(count, 151, seed=31 * seed + len(key)) for key, count in step.items()}
            expected, found = (driver.step(chunks) for driver in drivers)
            for key in step:
                error = (found[key] - expected[key]).norm() / expected[key].norm()
                assert error <= tolerance, f"{case}, {key} in step {seed}"
        for tensors in zip(*((*driver.kv.keys, *driver.kv.values) for driver in drivers), strict=True):
            # Block 0 holds the padding's, which nobody reads.
            wanted, ours = (tensor[1:].double() for tensor in tensors)
            assert torch.equal(ours.isnan(), wanted.isnan())
            assert (ours - wanted).nan_to_num().norm() <= tolerance * wanted.nan_to_num().norm(), case


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any, names: list[str], calls: list[tuple[str, Any]]) -> None:
    """From now on calls of the module's functions are noted: name, and whether it is told to overlap."""
    for name in names:
        function = getattr(module, name)

        def noting(*arguments: Any, name: str = name, function: Callable[..., Any] = function, **options: Any) -> Any:
            calls.append((name, options.get("pdl")))
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, noting)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_is_one_chain_of_five_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, and attention between them, each told to overlap with its neighbours; only some heads need a kernel more."""
    calls: list[tuple[str, Any]] = []
    recorded(monkeypatch, few_rows_layers, ["few_rows_linear", "few_rows_qkv"], calls)
    plain = ["rope_and_write_kv", "paged_attention", "rms_norm", "add_rms_norm", "gated_activation"]
    recorded(monkeypatch, layers, plain, calls)
    # What a GPU of the right kind says; here it changes no kernel.
    monkeypatch.setattr(layers, "has_pdl", lambda device: True)
    model = decoder(name)
    driver = Driver(model)
    driver.step({"a": [3, 4, 5]})
    calls.clear()
    driver.step({"a": [6]})
    linear, attention = ("few_rows_linear", True), ("paged_attention", True)
    first = [("few_rows_qkv", True)] if name in FUSED else [linear, ("rope_and_write_kv", None)]
    assert calls == [*first, attention, linear, linear, linear] * 3 + [linear]


def test_longer_steps_and_more_rows_go_through_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fused kernels are slower at, or do not take, they are not given: tokens count, and rows with padding."""
    calls: list[tuple[str, Any]] = []
    recorded(monkeypatch, few_rows_layers, ["few_rows_linear", "few_rows_qkv"], calls)
    model = decoder("llama")
    driver = Driver(model)
    driver.step({"a": [3] * (MAX_TOKENS + 1)})
    Driver(model, num_padding_rows=MAX_TOKENS).step({"a": [3, 4]})
    assert not calls
    driver.step({"a": [3] * MAX_TOKENS})
    assert calls


def test_only_where_it_is_faster_are_they_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being told: never on the CPU, and on a GPU that can overlap for 16 bits and sizes that are multiples of 16."""
    plain = decoder("llama", torch.float16, fuses_few_rows=None)
    assert plain._few_rows_layers is None
    monkeypatch.setattr(few_rows_layers, "has_pdl", lambda device: True)
    for dtype in (torch.float16, torch.bfloat16):
        assert decoder("llama", dtype, fuses_few_rows=None)._few_rows_layers is not None
    assert decoder("llama", fuses_few_rows=None)._few_rows_layers is None
    odd = random_model(LlamaConfig(**SIZES | {"intermediate_size": 72}))
    model = Decoder.from_config(odd.config, odd.state_dict(), dtype=torch.float16, device=CPU)
    assert not FewRowsLayers.suit(model._layers)
