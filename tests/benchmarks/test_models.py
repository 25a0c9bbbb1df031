"""The models of the benchmarks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.files import load_folder, write_folder
from benchmarks.gpu.models import SHAPES, Loaded, RandomWeights, make_loaded, make_transformers, random_prompt
from benchmarks.gpu.service import make_settings, serving

CPU = torch.device("cpu")


async def greedy(loaded: Loaded, prompt: Sequence[int], num_tokens: int) -> list[int]:
    async with serving(loaded, make_settings(loaded, num_slots=2, kv_tokens=256), run_ahead=0) as service:
        return (await service.complete(service.request(prompt, num_tokens))).token_ids


async def test_both_models_hold_the_same_weights(tiny: Loaded) -> None:
    """Every greedy token of our decoder is the likeliest of transformers' model that was made beside it, by its logits."""
    theirs = make_transformers("tiny", device=CPU, dtype=torch.float32)
    prompt = random_prompt(70, 512, random.Random(5))
    ids = await greedy(tiny, prompt, 24)
    with torch.inference_mode():
        logits = theirs(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, 69:-1]
    assert logits.std() > 0.5  # the weights are of a size at which they matter
    chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.max(dim=1).values, atol=1e-3, rtol=0)


def test_a_weight_depends_on_its_name_alone() -> None:
    """Reading in another order, or twice, changes nothing; another name or seed does."""
    first = RandomWeights(SHAPES["tiny"], dtype=torch.float16, device=CPU)
    again = RandomWeights(SHAPES["tiny"], dtype=torch.float16, device=CPU)
    names = [name for name in first if "proj" in name]
    values = {name: first[name] for name in names}
    for name in reversed(names):
        assert torch.equal(values[name], again[name])
    same_size = [name for name in names if "q_proj" in name]
    assert not torch.equal(values[same_size[0]], values[same_size[1]])
    other = RandomWeights(SHAPES["tiny"], dtype=torch.float16, device=CPU, seed=1)
    assert not torch.equal(other[names[0]], values[names[0]])


@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes_are_those_of_their_models(name: str) -> None:
    """So many parameters as the model of that name has, counted without making one."""
    weights = RandomWeights(SHAPES[name], dtype=torch.float16, device=CPU)
    sizes = {weight: size.numel() for weight, size in weights.sizes.items()}
    if SHAPES[name].config().tie_word_embeddings:
        sizes.pop("lm_head.weight", None)
    expected = {"smollm2": 134_515_008, "llama2-7b": 6_738_415_616, "llama3-8b": 8_030_261_248}
    assert sum(sizes.values()) == expected.get(name, sum(sizes.values())) > 0


def test_positions_can_be_more_than_the_models_own(tiny: Loaded) -> None:
    """The context grows, and no weight changes."""
    longer = make_loaded("tiny", device=CPU, dtype=torch.float32, num_positions=3000)
    assert (tiny.model.context_length, longer.model.context_length) == (2048, 3000)
    assert longer.model.num_parameters == tiny.model.num_parameters
    assert longer.model.weights_bytes == tiny.model.weights_bytes


async def test_files_hold_what_would_be_made(tiny: Loaded, tmp_path: Path) -> None:
    """A model read from its files gives the tokens of the one that was made."""
    write_folder(tmp_path, "tiny", device=CPU, dtype=torch.float32)
    read = load_folder(tmp_path, "tiny", device=CPU, dtype=torch.float32)
    prompt = random_prompt(20, 512, random.Random(6))
    assert await greedy(read, prompt, 16) == await greedy(tiny, prompt, 16)
