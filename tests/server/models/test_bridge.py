"""The bridge against transformers' own forward, on small models of many kinds with random weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    StableLmConfig,
)

from hotgraph_server.models.bridge import Bridge
from tests.server.models.driver import Driver, random_model, random_tokens, reference_logits
from tests.server.models.scenarios import check_chunked, check_mixed

TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
COMMON: dict[str, Any] = TOKENS | {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GQA = COMMON | {"num_key_value_heads": 2}
HALF_TURNED = {"partial_rotary_factor": 0.5}

PAGED: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma": lambda: GemmaConfig(**GQA, head_dim=16),
    "gemma2": lambda: Gemma2Config(
        **GQA, head_dim=16, sliding_window=11, query_pre_attn_scalar=20, attn_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **GQA, head_dim=16, sliding_window=13, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: GPT2Config(**TOKENS, vocab_size=300, n_embd=48, n_layer=2, n_head=4, n_positions=256),
    "gpt-neox": lambda: GPTNeoXConfig(**COMMON),
    "gpt-oss": lambda: GptOssConfig(**GQA, head_dim=16, sliding_window=12, num_local_experts=4, num_experts_per_tok=2),
    "opt": lambda: OPTConfig(
        **TOKENS | {"pad_token_id": 0},
        vocab_size=300,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=48,
    ),
    "phi": lambda: PhiConfig(**GQA | HALF_TURNED),
    "llama": lambda: LlamaConfig(**GQA),
}

ANEW: dict[str, Callable[[], PretrainedConfig]] = {
    "bloom": lambda: BloomConfig(**TOKENS, vocab_size=300, hidden_size=48, n_layer=2, n_head=4),
    "falcon with alibi": lambda: FalconConfig(**COMMON, alibi=True, new_decoder_architecture=False),
    "mamba": lambda: MambaConfig(**TOKENS, vocab_size=300, hidden_size=32, state_size=8, num_hidden_layers=2),
    "qwen2-moe with a window": lambda: Qwen2MoeConfig(
        **GQA,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=10,
        max_window_layers=1,
    ),
    "stablelm": lambda: StableLmConfig(**GQA | HALF_TURNED),
}

CONFIGS = PAGED | ANEW


@functools.cache
def reference(name: str) -> PreTrainedModel:
    """A transformers model with random weights."""
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    return random_model(config)


def bridge(name: str, max_context: int | None = None) -> Bridge:
    """Ours, around a copy of the reference."""
    return Bridge(copy.deepcopy(reference(name)), max_context=max_context)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_fast_way_is_taken_where_it_is_right(name: str) -> None:
    """Models that take transformers' attention interface run over the paged cache, the others compute texts anew."""
    model = bridge(name)
    assert model.is_paged == (name in PAGED), model.recompute_reason
    assert not model.is_capturable  # on the CPU nothing is
    assert bool(model.recompute_reason) == (name in ANEW)


@pytest.mark.parametrize("chunk_size", [60, 16, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_prefill_gives_the_logits_of_transformers(name: str, chunk_size: int) -> None:
    """A prompt gives the same logits whole and in chunks of any size."""
    check_chunked(bridge(name), reference(name), num_tokens=45, chunk_size=chunk_size)


@pytest.mark.parametrize("padding", [(0, 0), (5, 2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_steps_give_the_logits_of_transformers(name: str, padding: tuple[int, int]) -> None:
    """Rows that join, decode and leave in shared steps each get the logits they would get alone, padded or not."""
    check_mixed(bridge(name), reference(name), num_padding_tokens=padding[0], num_padding_rows=padding[1])


@pytest.mark.parametrize("name", ["gemma2", "bloom"])
def test_a_prefix_written_by_another_sequence_is_read(name: str) -> None:
    """What a row sees is what its block table names, whoever wrote it: prefixes can be shared."""
    model = bridge(name)
    tokens = random_tokens(40, model.vocabulary_size, seed=6)
    driver = Driver(model)
    driver.step({"writer": tokens[:32]})
    step, _ = driver.tensors({"reader": tokens})
    table = torch.tensor([driver.table("writer") + driver.table("reader")[2:]], dtype=torch.int32)
    step.block_tables = table
    step.token_ids, step.positions = step.token_ids[32:], step.positions[32:]
    step.kv_indices = step.kv_indices[32:]
    step.query_lens, step.last_indices = [8], step.last_indices - 32
    logits = model.forward(step, driver.kv)[0]
    torch.testing.assert_close(logits, reference_logits(reference(name), tokens)[-1], atol=1e-4, rtol=0)


def test_token_ids_of_large_vocabularies_survive_the_cache() -> None:
    """Where texts are kept as token ids, ids up to 2**24 come back exactly, in 16-bit caches too."""
    config = MambaConfig(**TOKENS, vocab_size=70_000, hidden_size=8, state_size=4, num_hidden_layers=1)
    own = random_model(config).bfloat16()
    model = Bridge(copy.deepcopy(own))
    tokens = [0, 69_999, 65_536, 255, 256, 65_535, 12_345]
    driver = Driver(model)
    driver.step({"a": tokens[:3]})
    logits = driver.step({"a": tokens[3:]})["a"]
    torch.testing.assert_close(logits, reference_logits(own, tokens)[-1], atol=0.1, rtol=0)


def test_the_model_describes_itself() -> None:
    """What the engine and the API tell of a model is the config's, and a layer of cache for each that attends."""
    model = bridge("gemma2", max_context=100)
    assert (model.architecture, model.runner) == ("Gemma2ForCausalLM", "bridge")
    assert (model.vocabulary_size, model.context_length) == (300, 100)
    assert [(layer.num_heads, layer.key_dim, layer.value_dim) for layer in model.kv_layout] == [(2, 16, 16)] * 2
    assert model.num_parameters * 4 == model.weights_bytes
    assert bridge("bloom").context_length == 2048


def test_longrope_is_paged_only_within_its_original_context() -> None:
    """Beyond it the model's frequencies depend on each whole text, so texts are computed anew."""
    parameters: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6,
    }
    config = Phi3Config(**GQA, rope_parameters=parameters, original_max_position_embeddings=64)
    own = random_model(config)
    assert Bridge(copy.deepcopy(own)).is_paged
    assert Bridge(copy.deepcopy(own)).context_length == 64
    long = Bridge(copy.deepcopy(own), max_context=200)
    assert (long.is_paged, long.context_length) == (False, 200)
