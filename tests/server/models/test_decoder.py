"""The lean decoder against transformers, on small models of each family with random weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models.arena import DecoderArena
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.shape import DecoderShape
from hotgraph_server.models.weights import PackedLinear
from tests.server.models.driver import Driver, random_model, random_tokens, reference_logits, round_to_bfloat16
from tests.server.models.scenarios import check_chunked, check_mixed

SIZES: dict[str, Any] = {
    "vocab_size": 151,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1],
    "long_factor": [2.0, 3.0],
    "partial_rotary_factor": 0.5,
}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama with one query head a KV head": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 6}),
    "llama with large heads": lambda: LlamaConfig(**SIZES, head_dim=16),
    "llama with gelu": lambda: LlamaConfig(**SIZES, hidden_act="gelu"),
    "llama with llama3 rope": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "llama with linear rope": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama with dynamic rope": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama with yarn rope": lambda: LlamaConfig(**SIZES, rope_parameters=YARN_ROPE),
    "mistral with a short window": lambda: MistralConfig(**SIZES, sliding_window=9),
    "mistral without a window": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 with windows in some layers": lambda: Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "phi3": lambda: Phi3Config(**SIZES),
    "phi3 with longrope and a window": lambda: Phi3Config(
        **SIZES, rope_parameters=LONG_ROPE, original_max_position_embeddings=128, sliding_window=40
    ),
}


@functools.cache
def reference(name: str) -> PreTrainedModel:
    """A transformers model with random weights that fit into float16 (which packs them, where that can be done)."""
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    return round_to_bfloat16(random_model(config))


def decoder(model: PreTrainedModel, **options: object) -> Decoder:
    """Ours, with the same weights."""
    arguments: dict[str, object] = {"dtype": torch.float32, "device": torch.device("cpu"), **options}
    return Decoder.from_config(model.config, model.state_dict(), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk_size", [200, 64, 16, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_prefill_gives_the_logits_of_transformers(name: str, chunk_size: int) -> None:
    """A prompt gives the same logits whole and in chunks of any size."""
    check_chunked(decoder(reference(name)), reference(name), num_tokens=100, chunk_size=chunk_size)


@pytest.mark.parametrize("padding", [(0, 0), (5, 2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_steps_give_the_logits_of_transformers(name: str, padding: tuple[int, int]) -> None:
    """Rows that join, decode and leave in shared steps each get the logits they would get alone, padded or not."""
    model = decoder(reference(name))
    check_mixed(model, reference(name), num_padding_tokens=padding[0], num_padding_rows=padding[1])


def test_decoding_token_by_token_gives_the_logits_of_transformers() -> None:
    """A text fed one token a step, from its first, gives the logits of the whole."""
    check_chunked(decoder(reference("llama")), reference("llama"), num_tokens=40, chunk_size=1)


def test_weights_that_do_not_fit_into_float16_are_kept_whole() -> None:
    """Weights with all bits of float32 in use are not packed, and give the logits of transformers at every batch size."""
    model = random_model(CONFIGS["llama with biases"]())
    ours = decoder(model)
    assert not isinstance(ours._layers.head, PackedLinear)
    check_mixed(ours, model)
    check_chunked(ours, model, num_tokens=50, chunk_size=9)


def test_only_who_gives_way_is_told_how_long_parts_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is served does not work it out, for nothing; one that is captured does so once, for all layers."""
    model = decoder(reference("llama"))
    layers = type(model._layers)
    asked: list[int] = []
    told: list[float] = []
    part_seconds = layers.part_seconds

    def counted(self: Any, num_tokens: int) -> tuple[float, float, float]:
        asked.append(num_tokens)
        return part_seconds(self, num_tokens)

    monkeypatch.setattr(layers, "part_seconds", counted)
    driver = Driver(model)
    step, _ = driver.tensors({"a": random_tokens(5, model.vocabulary_size, seed=1)})
    logits = model.forward(step, driver.kv)
    assert asked == []
    assert torch.equal(model.forward(step, driver.kv, None, told.append), logits)
    assert asked == [5]
    assert told == [*part_seconds(model._layers, 5)] * SIZES["num_hidden_layers"] + [math.inf]


def test_packed_weights_take_less_room() -> None:
    """Weights of a bfloat16 checkpoint are held in half the bytes where this machine can, and counted so."""
    ours = decoder(reference("llama with large heads"))
    if not isinstance(ours._layers.head, PackedLinear):
        pytest.skip("this machine's torch cannot pack")
    assert ours.num_parameters == sum(p.numel() for p in reference("llama with large heads").parameters())
    assert ours.num_parameters * 2 < ours.weights_bytes < ours.num_parameters * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_transformers(dtype: torch.dtype) -> None:
    """In 16 bits the logits differ from float32's by rounding only."""
    model = decoder(reference("qwen3"), dtype=dtype)
    tokens = random_tokens(50, model.vocabulary_size, seed=3)
    driver = Driver(model)
    driver.step({"a": tokens[:30]})
    logits = driver.step({"a": tokens[30:]})["a"]
    expected = reference_logits(reference("qwen3"), tokens)[-1]
    torch.testing.assert_close(logits, expected, atol=0.3 if dtype == torch.bfloat16 else 0.04, rtol=0)


def test_padding_changes_no_bit_of_what_real_rows_see() -> None:
    """Real rows' keys and values are the same bits whatever stands in the scratch block."""
    model = decoder(reference("llama"))
    tokens = random_tokens(20, model.vocabulary_size, seed=4)
    logits = []
    for scratch in (0.0, torch.nan, 1e30):
        driver = Driver(model, num_padding_tokens=4, num_padding_rows=3)
        for tensor in (*driver.kv.keys, *driver.kv.values):
            tensor[0] = scratch
        driver.step({"a": tokens[:19], "b": tokens[:3]})
        logits.append(driver.step({"a": tokens[19:], "b": tokens[3:4]})["a"])
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


# On the CPU the decoder does without an arena; made by hand, one shows here what it does on a GPU.
def arena_on_cpu(model: Decoder, name: str, *, max_tokens: int = 80, max_rows: int = 8) -> DecoderArena:
    """Room for the steps of these tests, full of NaN."""
    shape = DecoderShape.from_config(CONFIGS[name]())
    arena = DecoderArena(shape, max_tokens=max_tokens, max_rows=max_rows, dtype=model.dtype, device=model.device)
    for room in vars(arena).values():
        if isinstance(room, torch.Tensor):
            room.fill_(torch.nan)
    return arena


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_arena_changes_no_logit(name: str, dtype: torch.dtype) -> None:
    """Prefill, mixed and decode steps, padded or not, give through an arena what they give without, in every family."""
    model = decoder(reference(name), dtype=dtype)
    texts = {key: random_tokens(30, model.vocabulary_size, seed) for seed, key in enumerate("abc")}
    for padding in ((0, 0), (5, 2)):
        drivers = [
            Driver(model, num_padding_tokens=padding[0], num_padding_rows=padding[1], arena=arena)
            for arena in (None, arena_on_cpu(model, name))
        ]
        position = dict.fromkeys(texts, 0)
        for step in ({"a": 12}, {"a": 1, "b": 9}, {"a": 1, "b": 1}, {"b": 1, "c": 1, "a": 2}, {"a": 1, "b": 1, "c": 1}):
            chunks = {key: texts[key][position[key] : position[key] + count] for key, count in step.items()}
            expected, found = (driver.step(chunks) for driver in drivers)
            for key, count in step.items():
                position[key] += count
                tolerance = 1e-5 if dtype == torch.float32 else 5e-2
                torch.testing.assert_close(found[key], expected[key], atol=tolerance, rtol=tolerance)


def test_an_arena_holds_what_a_forward_makes() -> None:
    """The logits are a view of it: the next forward with that arena overwrites them, one with another does not."""
    model = decoder(reference("llama"))
    first, second = (arena_on_cpu(model, "llama") for _ in range(2))
    driver = Driver(model)
    tokens = random_tokens(12, model.vocabulary_size, seed=6)
    steps = [driver.tensors({key: tokens[start : start + 4]})[0] for start, key in ((0, "a"), (4, "b"), (8, "c"))]
    kept = model.forward(steps[0], driver.kv, first)
    before = kept.clone()
    model.forward(steps[1], driver.kv, second)
    assert torch.equal(kept, before)
    assert model.forward(steps[2], driver.kv, first).data_ptr() == kept.data_ptr()
    assert not torch.equal(kept, before)


def test_with_an_arena_one_token_a_row_follows_from_the_sizes() -> None:
    """Where tokens and rows are as many, nothing is picked out by row, whatever the host says of decode rows."""
    model = decoder(reference("llama"))
    driver = Driver(model)
    tokens = random_tokens(2, model.vocabulary_size, seed=7)
    step, _ = driver.tensors({"a": tokens[:1], "b": tokens[1:]})
    expected = model.forward(step, driver.kv)
    step.num_decode_rows = 0
    step.last_indices = torch.full_like(step.last_indices, 99)  # out of bounds, were it looked at
    assert torch.equal(model.forward(step, driver.kv, arena_on_cpu(model, "llama")), expected)


def test_an_arena_tells_its_bytes() -> None:
    """All its tensors are counted, one that serves twice once; more tokens and rows take more."""
    model = decoder(reference("llama"), dtype=torch.bfloat16)
    arena = arena_on_cpu(model, "llama", max_tokens=7, max_rows=3)
    rooms = {room.data_ptr(): room.nbytes for room in vars(arena).values() if isinstance(room, torch.Tensor)}
    assert arena.num_bytes == sum(rooms.values())
    assert arena.num_bytes < arena_on_cpu(model, "llama", max_tokens=8, max_rows=3).num_bytes
    assert arena.num_bytes < arena_on_cpu(model, "llama", max_tokens=7, max_rows=4).num_bytes


def test_on_the_cpu_there_is_no_arena() -> None:
    """There a matrix product chooses the layout of its result."""
    assert decoder(reference("llama")).arena(64, 8) is None


def test_the_context_is_the_smaller_of_the_models_and_the_settings() -> None:
    """max_context shortens the context and never lengthens it."""
    assert decoder(reference("llama")).context_length == 256
    assert decoder(reference("llama"), max_context=100).context_length == 100
    assert decoder(reference("llama"), max_context=1000).context_length == 256


def test_longrope_holds_its_original_context_unless_asked_for_more() -> None:
    """Short factors and the original context by default; long factors for all texts when a longer one is asked for."""
    model = reference("phi3 with longrope and a window")
    assert decoder(model).context_length == 128
    long = decoder(model, max_context=200)
    assert long.context_length == 200
    tokens = random_tokens(150, model.config.vocab_size, seed=5)
    driver = Driver(long)
    logits = driver.step({"a": tokens})["a"]
    torch.testing.assert_close(logits, reference_logits(model, tokens)[-1], atol=1e-4, rtol=0)


def test_the_model_describes_itself() -> None:
    """What the engine and the API tell of a model is the config's."""
    model = decoder(reference("qwen3"))
    assert model.architecture == "Qwen3ForCausalLM"
    assert model.runner == "decoder"
    assert model.vocabulary_size == 151
    assert len(model.kv_layout) == 3
    assert (model.kv_layout[0].num_heads, model.kv_layout[0].key_dim, model.kv_layout[0].value_dim) == (2, 16, 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_known_families_are_supported(name: str) -> None:
    """Every config of these tests runs on the decoder."""
    assert Decoder.supports(CONFIGS[name]())


def unknown_layer_type() -> PretrainedConfig:
    """A Qwen2 whose second layer does not attend."""
    config = CONFIGS["qwen2"]()
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    return config


def quantized() -> PretrainedConfig:
    """A Llama with 4-bit weights."""
    config = CONFIGS["llama"]()
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return config


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=1),
        GemmaConfig(**SIZES),
        LlamaConfig(**SIZES, hidden_act="mish"),
        LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE | {"partial_rotary_factor": 0.5}),
        LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
        unknown_layer_type(),
        quantized(),
    ],
    ids=["gpt2", "gemma", "activation", "partial rope", "heads", "layer type", "quantized"],
)
def test_what_the_decoder_does_not_know_exactly_it_refuses(config: PretrainedConfig) -> None:
    """Unknown families and unknown switches of known families are left to the bridge."""
    assert not Decoder.supports(config)
    with pytest.raises(ModelLoadError):
        Decoder.from_config(config, {}, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("change", ["missing", "too many", "wrong shape"])
def test_a_damaged_checkpoint_is_refused(change: str) -> None:
    """Weights that are missing, left over or of a wrong shape are named in an error."""
    model = reference("llama with large heads")
    weights = dict(model.state_dict())
    name = "model.layers.1.self_attn.q_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "too many":
        name = "model.layers.1.self_attn.q_proj.bias"
        weights[name] = torch.zeros(96)
    else:
        weights[name] = weights[name][:-1]
    with pytest.raises(ModelLoadError, match=name):
        Decoder.from_config(model.config, weights, dtype=torch.float32, device=torch.device("cpu"))
