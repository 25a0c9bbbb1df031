"""Tests of plain_config.py: what it reads is what transformers reads, and what is in doubt it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotgraph_server.models.json_file import read_json
from hotgraph_server.models.loader import make_config
from hotgraph_server.models.plain_config import read_plain
from hotgraph_server.models.rotary import rotary
from hotgraph_server.models.shape import DecoderShape
from tests.server.models.tiny_models import write_llama

PATH = Path("config.json")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


def raw(family: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **FAMILIES[family], **changes}


def assert_alike(wanted: dict[str, Any]) -> None:
    """Both readers give the decoder the same sizes and switches, frequencies, and limits."""
    plain, theirs = read_plain(wanted), make_config(wanted, PATH)
    assert plain is not None
    shape = DecoderShape.from_config(plain)
    assert shape == DecoderShape.from_config(theirs)
    ours, expected = rotary(plain, shape, None), rotary(theirs, shape, None)
    assert torch.equal(ours.inverse_frequencies, expected.inverse_frequencies)
    assert (ours.scaling, ours.context_length) == (expected.scaling, expected.context_length)
    text_config = theirs.get_text_config()
    assert plain.get_text_config().vocab_size == text_config.vocab_size
    assert plain.max_position_embeddings == text_config.max_position_embeddings


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_it_reads_what_transformers_reads(data: st.DataObject) -> None:
    """Whatever plain configuration is drawn: families, sizes, ties, biases, windows, either spelling of the rotary base."""
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    num_kv_heads, group = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    num_heads = num_kv_heads * group
    wanted = raw(
        family,
        vocab_size=data.draw(st.integers(1, 200_000)),
        hidden_size=num_heads * 2 * data.draw(st.integers(1, 40)),
        intermediate_size=data.draw(st.integers(1, 5000)),
        num_hidden_layers=data.draw(st.integers(1, 12)),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=data.draw(st.integers(2, 100_000)),
        rms_norm_eps=data.draw(st.floats(1e-8, 1e-3)),
        rope_theta=data.draw(st.sampled_from([1e4, 5e5, 10000, 1000000.0])),
    )
    if data.draw(st.booleans()):
        wanted["rope_parameters"] = {"rope_type": "default", "rope_theta": wanted.pop("rope_theta")}
    elif data.draw(st.booleans()):
        wanted["rope_scaling"] = None
    if data.draw(st.booleans()):
        wanted["tie_word_embeddings"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        wanted["architectures"] = data.draw(st.sampled_from([None, ["SomethingForCausalLM"]]))
    if data.draw(st.booleans()):
        del wanted["hidden_act"]
    if family in {"llama", "qwen3"} and data.draw(st.booleans()):
        wanted["attention_bias"] = data.draw(st.booleans())
    if family == "llama" and data.draw(st.booleans()):
        wanted["mlp_bias"] = data.draw(st.booleans())
    if family != "qwen2" and data.draw(st.booleans()):
        wanted["head_dim"] = 2 * data.draw(st.integers(1, 64))
    if family == "mistral":
        wanted["sliding_window"] = data.draw(st.sampled_from([None, 128]))
    if family.startswith("qwen") and data.draw(st.booleans()):
        wanted |= {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
    assert_alike(wanted)


def test_it_reads_what_transformers_writes() -> None:
    """A configuration that transformers wrote in full is plain, too."""
    for family in FAMILIES:
        written = json.loads(make_config(raw(family), PATH).to_json_string(use_diff=False))
        assert_alike(written)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},  # beside the older spelling
        {"rope_theta": None},
        {"quantization_config": {"quant_method": "gptq"}},
        {"auto_map": {"AutoConfig": "x.Y"}},
        {"something_new": 1},
        {"hidden_size": 63},
        {"hidden_size": 64.0},
        {"num_hidden_layers": True},
        {"vocab_size": -5},
        {"num_key_value_heads": None},
        {"tie_word_embeddings": "yes"},
        {"hidden_act": None},
        {"rms_norm_eps": 1},
        {"architectures": "LlamaForCausalLM"},
        {"head_dim": 0},
    ],
    ids=str,
)
def test_what_is_in_doubt_is_left_to_transformers(changes: dict[str, Any]) -> None:
    """Anything unknown, missing or of another type is not plain."""
    assert read_plain(raw("llama")) is not None
    assert read_plain(raw("llama", **changes)) is None


def test_windows_that_are_not_clear_are_left_to_transformers() -> None:
    """A window that nothing is said of, or that only some layers have, is not plain; nor is another family."""
    missing = raw("mistral")
    del missing["sliding_window"]
    assert read_plain(missing) is None
    assert read_plain(raw("qwen2", use_sliding_window=True, sliding_window=16)) is None
    assert read_plain(raw("qwen2", layer_types=["full_attention"] * 2)) is None
    assert read_plain(raw("qwen2", layer_types=["sliding_attention"] * 3)) is None
    unsized = raw("qwen3")
    del unsized["head_dim"]
    assert read_plain(unsized) is None
    assert read_plain(raw("llama", model_type="gpt2")) is None
    assert read_plain({}) is None


PROGRAM = """
import sys
from hotgraph_server.config import ModelSettings
from hotgraph_server.models.loader import load_model
loaded = load_model(ModelSettings(source=sys.argv[1], device="cpu"))
assert loaded.model.runner == "decoder"
assert "transformers" not in sys.modules
"""


def test_a_plain_model_is_loaded_without_transformers(tmp_path: Path) -> None:
    """Loading a folder of a common model imports no transformers."""
    folder = write_llama(tmp_path / "model")
    assert read_plain(read_json(folder / "config.json")) is not None
    subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], check=True)
