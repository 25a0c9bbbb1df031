"""Batch-invariant layers on the CPU, where each kernel is its plain definition: what goes through them, and who is refused."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from hotgraph_server.errors import ModelLoadError
from hotgraph_server.kernels.attention import paged_attention
from hotgraph_server.kernels.invariant_rows import padded_rows
from hotgraph_server.models import arena as arena_module
from hotgraph_server.models import invariant_layers, layers
from hotgraph_server.models.arena import DecoderArena
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.invariant_layers import InvariantLayers
from hotgraph_server.models.shape import DecoderShape
from tests.server.models.driver import Driver, random_tokens
from tests.server.models.test_few_rows_layers import CONFIGS, CPU, TOLERANCES, decoder, recorded, source

STEPS: list[dict[str, int]] = [
    {"a": 1},
    {f"row {row}": 1 + row for row in range(11)},
    dict.fromkeys(map("row {}".format, range(11)), 1),
    {"a": 1, "b": 70},
    {"a": 1, "b": 1, "c": 100},
]


def invariant(name: str, dtype: torch.dtype = torch.float32, *, is_forced: bool = True) -> Decoder:
    return Decoder.from_config(
        deepcopy(source(name).config),
        source(name).state_dict(),
        dtype=dtype,
        device=CPU,
        fuses_few_rows=True if is_forced else None,
        batch_invariant=True,
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_plain_layers(name: str, dtype: torch.dtype) -> None:
    """Lone rows, many, prompts of more tokens than a program has room for, and mixed steps give the same logits."""
    drivers = [
        Driver(model, num_padding_tokens=2, num_padding_rows=1)
        for model in (decoder(name, dtype, fuses_few_rows=False), invariant(name, dtype))
    ]
    for seed, step in enumerate(STEPS):
        chunks = {key: random_tokens(count, 151, seed=31 * seed + len(key)) for key, count in step.items()}
        expected, found = (driver.step(chunks) for driver in drivers)
        for key in step:
            error = (found[key] - expected[key]).norm() / expected[key].norm()
            assert error <= TOLERANCES[dtype], f"{key} in step {seed}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_product_of_every_step_is_invariant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one token on there is one kind of product and of attention, and nothing is multiplied elsewhere."""
    calls: list[tuple[str, object]] = []
    recorded(monkeypatch, invariant_layers, ["invariant_linear", "invariant_qkv"], calls)
    kinds: list[object] = []

    def noted(*arguments: object, is_invariant: bool, **options: object) -> torch.Tensor:
        kinds.append(is_invariant)
        return paged_attention(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "paged_attention", noted)
    monkeypatch.setattr(layers, "has_pdl", lambda device: True)
    model = invariant(name)
    driver = Driver(model)
    num_layers = len(model.kv_layout)
    for num_tokens in (1, 2, 3, 9, 65, 130):
        calls.clear()
        kinds.clear()
        driver.step({f"{num_tokens}": [3] * num_tokens})
        assert len(calls) == 4 * num_layers + 1
        assert kinds == [True] * num_layers


def test_models_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU, float32, and weights that the kernel does not know: each is told, and nothing else is run in its place."""
    with pytest.raises(ModelLoadError, match=r"model\.batch_invariant needs an NVIDIA GPU of compute capability 9"):
        invariant("llama", torch.float16, is_forced=False)
    monkeypatch.setattr(invariant_layers, "runs_on", lambda device: True)
    with pytest.raises(ModelLoadError, match=r"needs model\.dtype float16 or bfloat16, not float32"):
        invariant("llama", is_forced=False)
    model = invariant("llama", torch.float16, is_forced=False)
    assert isinstance(model._layers, InvariantLayers)
    monkeypatch.setattr(invariant_layers, "suits", lambda weight: weight.shape[1] != 80)
    with pytest.raises(ModelLoadError, match="no product for a weight 48x80"):
        invariant("llama", torch.float16, is_forced=False)


def test_the_arena_has_room_for_all_that_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """For steps of all sizes up to its own, two numbers for each padded row and output."""
    monkeypatch.setattr(arena_module, "runs_on", lambda device: True)
    shape = DecoderShape.from_config(CONFIGS["llama"]())
    for is_invariant, num_rows, splits in ((False, 64, 4), (True, padded_rows(300), 2)):
        arena = DecoderArena(
            shape, max_tokens=300, max_rows=12, dtype=torch.float16, device=CPU, is_invariant=is_invariant
        )
        room = arena.tokens(300).split_room
        assert room is not None
        assert room.partials.numel() == splits * num_rows * 128
