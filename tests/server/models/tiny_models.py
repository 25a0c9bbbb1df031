"""Tiny tokenizers and random-weight models, written as the files that the loader reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 32, 2, 4, 2, 8, 64


def byte_level_vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Special tokens, all bytes, and three merges; and the merges."""
    merges = [("h", "e"), ("l", "l"), ("Ġ", "Ġ")]
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    return tokens, merges


def byte_level_tokenizer() -> Tokenizer:
    """As GPT-2's, with every digit on its own."""
    tokens, merges = byte_level_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: spaces as U+2581, and bytes as <0xNN> for characters the vocabulary lacks."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "▁hi", "é"]
    merges = [("▁", "h"), ("▁h", "i")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def llama_config(vocabulary_size: int) -> dict[str, Any]:
    """`config.json` of a tiny Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": vocabulary_size,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def llama_weights(vocabulary_size: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Its weights, random, float32."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    weights = {
        "model.embed_tokens.weight": matrix(vocabulary_size, HIDDEN),
        "model.norm.weight": 1 + matrix(HIDDEN),
        "lm_head.weight": matrix(vocabulary_size, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": 1 + matrix(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": 1 + matrix(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
        }
    return weights


def write_json(path: Path, value: Any) -> None:
    """As a file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def write_llama(folder: Path, *, num_shards: int = 1) -> Path:
    """A whole Hugging Face folder of a tiny Llama with a byte-level tokenizer. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_tokenizer()
    weights = llama_weights(tokenizer.get_vocab_size())
    write_json(folder / "config.json", llama_config(tokenizer.get_vocab_size()))
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0], "temperature": 0.7})
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHAT_TEMPLATE},
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    if num_shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::num_shards]}
        save_file(part, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def write_gguf(
    path: Path, *, architecture: str = "llama", quantise: bool = False, eot_token_id: int | None = None
) -> dict[str, torch.Tensor]:
    """The same tiny Llama as a GGUF file, as llama.cpp's converter writes it. Returns the weights that are in it.

    `quantise` stores matrices as Q8_0; what comes back then differs from the file by rounding.
    """
    weights = llama_weights(len(byte_level_vocabulary()[0]))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = _gguf_writer(path, architecture)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    if eot_token_id is not None:
        writer.add_eot_token_id(eot_token_id)
    for name, tensor in weights.items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = _permute(values, HEADS if "q_proj" in name else KV_HEADS)
        if quantise and values.ndim == 2:
            raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(_gguf_name(names, name), raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(_gguf_name(names, name), values)
    _finish(writer)
    return weights


def write_starcoder2_gguf(path: Path) -> int:
    """A tiny StarCoder2, an architecture that the converter does not know. Returns its number of parameters."""
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    config = Starcoder2Config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=len(byte_level_vocabulary()[0]),
        sliding_window=None,
    )
    model = Starcoder2ForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STARCODER2, LAYERS)
    writer = _gguf_writer(path, "starcoder2")
    writer.add_layer_norm_eps(1e-5)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            writer.add_tensor(_gguf_name(names, name), tensor.numpy())
    _finish(writer)
    return sum(parameter.numel() for parameter in model.parameters())


def _gguf_writer(path: Path, architecture: str) -> gguf.GGUFWriter:
    tokens, merges = byte_level_vocabulary()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    return writer


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permute(values: np.ndarray[Any, np.dtype[np.float32]], num_heads: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Halves to pairs side by side: the order that llama.cpp wants for rotary embeddings."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    mapped = names.get_name(stem)
    assert mapped is not None
    return f"{mapped}.{suffix}"
