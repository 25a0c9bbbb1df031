"""GGUF to Hugging Face: configuration, weights under their usual names, tokenizer, and a folder holding all three.

It knows llama.cpp's names for the Llama-shaped architectures that `decoder.py` runs. It knows nothing of where files come
from or are kept (`registry.py`). Each float32 tensor equals the one that transformers reads from the same file.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models.gguf_file import GgufFile

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

# How a byte-level vocabulary's text is split before merging, by llama.cpp's `tokenizer.ggml.pre`. SmolLM splits off every
# digit first and then splits as GPT-2 does (its tokenizer.json: Digits, then ByteLevel without a prefix space; llama.cpp
# has the same two expressions). The tokenizer that transformers builds from the file lacks the Digits, which shows where
# spaces precede a digit: "a  1" must be "a", "  ", "1".
_DIGITS_THEN_GPT2 = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
_GPT2 = frozenset({"gpt-2"})
_LLAMA3 = frozenset({"llama-bpe", "llama3", "llama-v3"})
_QWEN2 = frozenset({"qwen2", "deepseek-r1-qwen"})
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4


def is_known(file: GgufFile) -> bool:
    """Whether the file's architecture is one whose names are known here. Mixtures of experts are not."""
    return file.architecture in ARCHITECTURES and not file.metadata.get(f"{file.architecture}.expert_count", 0)


def read_config(file: GgufFile) -> dict[str, Any]:
    """What `config.json` would say. Raises ModelLoadError for an architecture that is not one of ARCHITECTURES."""
    architecture, metadata = file.architecture, file.metadata
    if not is_known(file):
        raise ModelLoadError(f"{file.path}: GGUF files of architecture {architecture!r} are not known here")
    if int(metadata.get("split.count", 1)) > 1:
        raise ModelLoadError(f"{file.path}: is one part of a split model; merge the parts first")

    def value(key: str) -> Any:
        if f"{architecture}.{key}" not in metadata:
            raise ModelLoadError(f"{file.path}: has no metadata {architecture}.{key}")
        return metadata[f"{architecture}.{key}"]

    if "token_embd.weight" not in file.tensors:
        raise ModelLoadError(f"{file.path}: has no tensor token_embd.weight")
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[architecture]], "model_type": architecture}
    config |= {name: int(value(key)) for key, name in _CONFIG_KEYS.items()}
    num_heads = config["num_attention_heads"]
    config["num_key_value_heads"] = int(metadata.get(f"{architecture}.attention.head_count_kv", num_heads))
    # The file holds float32; its shortest spelling is the number that was meant (1e-05, not 9.999999747378752e-06).
    config["rms_norm_eps"] = float(str(np.float32(value("attention.layer_norm_rms_epsilon"))))
    config["head_dim"] = int(metadata.get(f"{architecture}.attention.key_length", config["hidden_size"] // num_heads))
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["hidden_act"] = "silu"
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["rope_theta"] = float(metadata.get(f"{architecture}.rope.freq_base", 10000.0))
    if (scaling := _rope_scaling(file)) is not None:
        config["rope_scaling"] = scaling
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        config[name] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    config["dtype"] = "float32"
    return config


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    prefix = f"{file.architecture}.rope.scaling"
    kind = file.metadata.get(f"{prefix}.type", "none")
    if _ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelLoadError(f"{file.path}: rope scaling {kind!r} is not supported")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(file.metadata.get(f"{prefix}.factor", 1.0))}
    if (original := file.metadata.get(f"{prefix}.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def _llama3_scaling(file: GgufFile) -> dict[str, Any]:
    """Llama 3's scaling from the factors by frequency that the file has in its place.

    The file has only the result, so the settings every Llama 3 was published with are tried, and must give the factors.
    """
    factors = file.read_tensor(_ROPE_FACTORS)
    base = float(file.metadata.get(f"{file.architecture}.rope.freq_base", 10000.0))
    low, high, original = 1.0, 4.0, 8192
    factor = round(float(factors.max()), 3)
    wavelengths = 2 * np.pi * base ** (np.arange(len(factors)) / len(factors))
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelLoadError(f"{file.path}: its rope factors are not those of Llama 3 and are not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


class GgufWeights(Mapping[str, torch.Tensor]):
    """The file's tensors under their Hugging Face names, read and dequantised to float32 when asked for."""

    def __init__(self, file: GgufFile, config: Mapping[str, Any]) -> None:
        self._file = file
        self._num_heads = int(config["num_attention_heads"])
        self._num_kv_heads = int(config["num_key_value_heads"])
        self._names = {_hugging_face_name(file, name): name for name in file.tensors if name != _ROPE_FACTORS}

    def __getitem__(self, name: str) -> torch.Tensor:
        """[out, in] for a linear layer, float32."""
        return torch.from_numpy(self.read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading it."""
        return self._file.tensors[self._names[name]].shape

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """As a numpy array."""
        values = self._file.read_tensor(self._names[name])
        if self._file.architecture == "llama" and ".q_proj." in name:
            values = _unpermute(values, self._num_heads)
        elif self._file.architecture == "llama" and ".k_proj." in name:
            values = _unpermute(values, self._num_kv_heads)
        return values


def _unpermute(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rows of a rotary projection from llama.cpp's order (pairs side by side) to transformers' (halves)."""
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _hugging_face_name(file: GgufFile, name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ModelLoadError(f"{file.path}: tensor {name} is not known in architecture {file.architecture!r}")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{suffix}"


def build_tokenizer(file: GgufFile) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer that the file describes, and what `tokenizer_config.json` would say of it.

    Byte-level vocabularies whose way of splitting is known are built here; any other by transformers, from the same file.
    """
    metadata = file.metadata
    tokens: list[str] | None = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelLoadError(f"{file.path}: has no tokenizer")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # so that transformers takes tokenizer.json as it stands
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(metadata.get(f"{file.architecture}.context_length", 1 << 30)),
        "chat_template": metadata.get("tokenizer.chat_template", ""),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ModelLoadError(f"{file.path}: the {name} token {token_id} is not in the vocabulary")
        config[f"{name}_token"] = None if token_id is None else tokens[token_id]
    split = metadata.get("tokenizer.ggml.pre")
    is_known = split in _DIGITS_THEN_GPT2 | _GPT2 | _LLAMA3 | _QWEN2
    if metadata.get("tokenizer.ggml.model") != "gpt2" or not is_known:
        return _transformers_tokenizer(file), config
    tokenizer = _byte_level_tokenizer(file, tokens, str(split))
    if metadata.get("tokenizer.ggml.add_bos_token", split in _LLAMA3) and config["bos_token"]:
        bos, bos_id = config["bos_token"], metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer, config


def _byte_level_tokenizer(file: GgufFile, tokens: list[str], split: str) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split in _LLAMA3)
    except Exception as error:  # the library raises plain Exception when a merge is not in the vocabulary
        raise ModelLoadError(f"{file.path}: its merges do not fit its vocabulary ({error})") from error
    tokenizer = Tokenizer(model)
    if split in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    if split in _LLAMA3 | _QWEN2:
        words = Regex(_WORDS % ("{1,3}" if split in _LLAMA3 else ""))
        steps = [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if split in _DIGITS_THEN_GPT2:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == _CONTROL_TOKEN:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED_TOKEN:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    return tokenizer


def _transformers_tokenizer(file: GgufFile) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and most files need none of it

    try:
        built = AutoTokenizer.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name, local_files_only=True, trust_remote_code=False
        )
        return built.backend_tokenizer
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, NotImplementedError) as error:
        raise ModelLoadError(f"{file.path}: its tokenizer cannot be read ({error})") from error


def end_token_ids(file: GgufFile) -> list[int]:
    """The tokens that end a text. Chat models may have one that ends a turn (eot) beside the one that ends a document."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return sorted({int(file.metadata[key]) for key in keys if key in file.metadata})


def _generation_config(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `generation_config.json` would say."""
    ends = end_token_ids(file)
    values = {name: config[name] for name in ("bos_token_id", "pad_token_id")}
    values["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return {name: value for name, value in values.items() if value not in (None, [])}


def write_folder(
    gguf: Path, folder: Path, *, notes: Mapping[str, str], progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes `gguf` as a Hugging Face folder of float32 safetensors, and `notes` as files beside it.

    `folder` must exist. `progress` is called with bytes of weights written so far and in all. Nothing here is atomic: the
    caller publishes the folder.
    """
    file = GgufFile(gguf)
    config = read_config(file)
    tokenizer, tokenizer_config = build_tokenizer(file)
    texts = dict(notes)
    texts["config.json"] = _json(config)
    texts["generation_config.json"] = _json(_generation_config(file, config))
    texts["tokenizer_config.json"] = _json(tokenizer_config)
    texts["tokenizer.json"] = tokenizer.to_str(pretty=False)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    _write_safetensors(GgufWeights(file, config), folder / "model.safetensors", progress)


def _write_safetensors(weights: GgufWeights, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """One tensor in memory at a time, which the library's own writer cannot do."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total_bytes = 0
    for name in weights:
        shape = weights.shape(name)
        end = total_bytes + int(np.prod(shape)) * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [total_bytes, end]}
        total_bytes = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(len(encoded) + 8) % 64)  # so that the data is aligned
    num_written = 0
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in weights:
            num_written += out.write(np.ascontiguousarray(weights.read(name), dtype="<f4").tobytes())
            if progress is not None:
                progress(num_written, total_bytes)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
