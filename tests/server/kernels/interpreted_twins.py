"""The Triton kernels in Triton's interpreter, on the CPU. `test_twins.py` runs this file in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl  # type: ignore[import-untyped]  # it comes without types
from triton.runtime import interpreter  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.activation import ACTIVATIONS, gated_activation_triton
from hotgraph_server.kernels.norm import add_rms_norm_triton, rms_norm_triton
from hotgraph_server.kernels.rope_kv import rope_and_write_kv_triton
from hotgraph_server.models import layers
from tests.server.kernels import twin_checks
from tests.server.models import test_decoder
from tests.server.models.driver import Driver, random_tokens, reference_logits

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def rounding_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of Triton 3.6 cuts float32 off where it makes bfloat16 of it; GPUs round."""
    cut_off = interpreter._convert_float

    def convert(data: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> Any:
        if from_dtype == tl.float32 and to_dtype == tl.bfloat16:
            return torch.tensor(data).bfloat16().view(torch.uint16).numpy()
        return cut_off(data, from_dtype, to_dtype, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.mark.parametrize("dtype", twin_checks.DTYPES, ids=str)
@pytest.mark.parametrize("size", twin_checks.HIDDEN_SIZES)
def test_norm(size: int, dtype: torch.dtype) -> None:
    """Norm, and sum and norm, for sizes that are no power of two and dtypes of 16 and 32 bits."""
    twin_checks.check_rms_norm(size, dtype, CPU, num_tokens=3, seed=size)
    twin_checks.check_add_rms_norm(size, dtype, CPU, num_tokens=3, seed=size + 1)


@pytest.mark.parametrize("dtype", twin_checks.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # to infinity, whose inverse is the right 0
def test_activation(activation: str, dtype: torch.dtype) -> None:
    """Every activation, for rows of less than a block and of more than one."""
    twin_checks.check_gated_activation(activation, 80, dtype, CPU, num_tokens=3, seed=1)
    twin_checks.check_gated_activation(activation, 5000, dtype, CPU, num_tokens=2, seed=2)


@pytest.mark.parametrize("dtype", twin_checks.DTYPES, ids=str)
@pytest.mark.parametrize("heads", twin_checks.HEADS.values(), ids=twin_checks.HEADS)
def test_rope_and_write_kv(heads: tuple[int, int, int, int, bool], dtype: torch.dtype) -> None:
    """Heads of every kind and size."""
    twin_checks.check_rope_and_write_kv(heads, dtype, CPU, num_tokens=3, seed=3)


def test_prepare_step() -> None:
    """Rows and tokens of every kind, with and without changes of their slots."""
    for seed in range(8):
        twin_checks.check_prepare_step(CPU, seed=seed)


def test_prepare_step_of_long_rows() -> None:
    """Rows of more tokens than a program takes, and block tables longer than one copies at once."""
    for seed in range(3):
        twin_checks.check_prepare_step(CPU, seed=seed, max_rows=3, max_blocks=1500, lengths=(1, 300, 1100))


@pytest.mark.parametrize("name", ["qwen3", "phi3 with longrope and a window"])
def test_a_decoder_made_of_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the logits of transformers: what it hands the kernels is laid out as they take it."""
    monkeypatch.setattr(layers, "rms_norm", rms_norm_triton)
    monkeypatch.setattr(layers, "add_rms_norm", add_rms_norm_triton)
    monkeypatch.setattr(layers, "rope_and_write_kv", rope_and_write_kv_triton)
    monkeypatch.setattr(layers, "gated_activation", gated_activation_triton)
    reference = test_decoder.reference(name)
    model = test_decoder.decoder(reference, dtype=torch.float16)  # whose products are laid out as on a GPU
    texts = {key: random_tokens(6, model.vocabulary_size, seed) for seed, key in enumerate("ab")}
    arena = test_decoder.arena_on_cpu(model, name)
    driver = Driver(model, num_padding_tokens=1, num_padding_rows=1, arena=arena)
    position = dict.fromkeys(texts, 0)
    for step in ({"a": 3}, {"a": 1, "b": 2}, {"a": 1, "b": 1}):
        chunks = {key: texts[key][position[key] : position[key] + count] for key, count in step.items()}
        for key, logits in driver.step(chunks).items():
            position[key] += step[key]
            expected = reference_logits(reference, texts[key][: position[key]])[-1]
            assert (logits - expected).norm() < 2e-2 * expected.norm()
