"""Layers for tens of tokens against those for any number, on the CPU, where each fused kernel is its plain definition."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.kernels.tile_rows_cuts import MAX_ROWS
from hotgraph_server.models import layers, tile_rows_layers
from hotgraph_server.models.arena import DecoderArena
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.shape import DecoderShape
from hotgraph_server.models.tile_rows_layers import TileRowsLayers
from tests.server.models.driver import Driver, random_tokens
from tests.server.models.test_few_rows_layers import CONFIGS, CPU, TOLERANCES, decoder, recorded

# Tokens of each row, a step after the other.
STEPS: dict[str, list[dict[str, int]]] = {
    "decode rows": [
        {f"row {row}": 3 + row for row in range(11)},
        *[dict.fromkeys(map("row {}".format, range(11)), 1)] * 2,
    ],
    "prompts": [{"a": 9}, {"b": 33}, {"c": MAX_ROWS}, {"a": 16, "b": 1, "c": 1}],
    "mixed": [{"a": 20, "b": 40}, {"a": 1, "b": 1, "c": 30}, {"b": 1, "a": 3, "c": 14}],
}


def arena_for(model: Decoder, name: str) -> DecoderArena:
    """Full of NaN."""
    shape = DecoderShape.from_config(CONFIGS[name]())
    arena = DecoderArena(shape, max_tokens=170, max_rows=14, dtype=model.dtype, device=CPU)
    for room in vars(arena).values():
        if isinstance(room, torch.Tensor):
            room.fill_(torch.nan)
    return arena


@pytest.mark.parametrize("has_arena", [False, True], ids=["without an arena", "with an arena"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_plain_layers(name: str, dtype: torch.dtype, has_arena: bool) -> None:
    """Decode rows, prompts and mixed steps of tens of tokens give the same logits, with padding, too."""
    plain, fused = decoder(name, dtype, fuses_few_rows=False), decoder(name, dtype)
    for case, steps in STEPS.items():
        drivers = [
            Driver(
                model,
                num_padding_tokens=2,
                num_padding_rows=1,
                arena=arena_for(model, name) if has_arena else None,
            )
            for model in (plain, fused)
        ]
        for seed, step in enumerate(steps):
            chunks = {key: random_tokens(count, 151, seed=31 * seed + len(key)) for key, count in step.items()}
            expected, found = (driver.step(chunks) for driver in drivers)
            for key in step:
                error = (found[key] - expected[key]).norm() / expected[key].norm()
                assert error <= TOLERANCES[dtype], f"{case}, {key} in step {seed}"


def test_they_are_given_tens_of_tokens_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where those for few end up to what the kernels take; every product overlaps with its neighbours."""
    calls: list[tuple[str, object]] = []
    recorded(monkeypatch, tile_rows_layers, ["tile_rows_linear", "tile_rows_qkv"], calls)
    monkeypatch.setattr(layers, "has_pdl", lambda device: True)
    driver = Driver(decoder("llama with groups, tied"))
    for num_tokens, is_taken in ((8, False), (9, True), (MAX_ROWS, True), (MAX_ROWS + 1, False)):
        calls.clear()
        driver.step({f"{num_tokens}": [3] * num_tokens})
        assert bool(calls) == is_taken
        assert all(pdl for _, pdl in calls)


def test_large_layers_are_given_to_them_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer's time is its bytes they begin at three tokens; two go through the kernels for few rows still."""
    calls: list[tuple[str, object]] = []
    recorded(monkeypatch, tile_rows_layers, ["tile_rows_linear", "tile_rows_qkv"], calls)
    small = decoder("llama")._tile_rows_layers
    assert small is not None
    assert small.min_tokens == tile_rows_layers.MIN_TOKENS
    layer_bytes = sum(linear.num_bytes for linear in small.layers[0].linears)
    monkeypatch.setattr(tile_rows_layers, "LARGE_LAYER_BYTES", layer_bytes)
    driver = Driver(decoder("llama"))
    for num_tokens in (2, 3, 8):
        calls.clear()
        driver.step({f"{num_tokens}": [3] * num_tokens})
        assert bool(calls) == (num_tokens >= 3)


def test_only_where_the_kernels_run_are_they_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being told: never on the CPU, and where the kernel runs for 16 bits."""
    assert decoder("llama", torch.float16, fuses_few_rows=None)._tile_rows_layers is None
    monkeypatch.setattr(tile_rows_layers, "runs_on", lambda device: True)
    assert decoder("llama", torch.float16, fuses_few_rows=None)._tile_rows_layers is not None
    assert not TileRowsLayers.suit(decoder("llama", fuses_few_rows=None)._layers)
