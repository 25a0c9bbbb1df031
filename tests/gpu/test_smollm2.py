"""SmolLM2 on a GPU: what transformers computes, and the same text through graphs, eagerly, and while graphs come and go.

The model is the embedded one, or the GGUF file that HOTGRAPH_SMOLLM2_GGUF names, where it cannot be fetched.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from graphcache import GraphState
from hotgraph_server.config import GraphSettings, ModelSettings
from hotgraph_server.models import convert, registry
from hotgraph_server.models.loader import LoadedModel, load_model
from hotgraph_server.request import Request, SamplingParams, StopParams
from hotgraph_server.text import Tokenizer
from tests.gpu.retrace import retrace, trace
from tests.gpu.serving import Service, eager, same_or_tied, service
from tests.integration.texts import TEXTS, prompts
from tests.server.models.driver import Driver

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

CUDA = torch.device("cuda:0")
CHUNK_TOKENS = 512
LONG_LENGTHS = (1025, 1500, 2000)
TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
"""Of a row's logits, norm of the difference over norm, against float32: rounding, grown over thirty layers."""
TIES = {torch.float16: 0.2, torch.bfloat16: 1.5}
"""How far logits may lie apart for rounding to choose: this model's are ten times as large as those of random weights."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    gguf = os.environ.get("HOTGRAPH_SMOLLM2_GGUF")
    if gguf is None:
        yield registry.pull("smollm2-135m-instruct")
    else:
        path = tmp_path_factory.mktemp("smollm2")
        convert.write_folder(Path(gguf), path, notes={})
        yield path


@pytest.fixture(scope="module", params=list(TOLERANCES), ids=str)
def loaded(request: pytest.FixtureRequest, folder: Path) -> LoadedModel:
    dtype = str(request.param).removeprefix("torch.")
    return load_model(ModelSettings(source=str(folder), device="cuda:0", dtype=dtype))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """transformers' own model in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(CUDA).eval()


def all_prompts(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Prompts of 1 to 2,000 tokens."""
    ids = tokenizer.encode("".join(TEXTS) * 8)
    return [*prompts(tokenizer), *(tuple(ids[11 * index :][:length]) for index, length in enumerate(LONG_LENGTHS))]


def test_logits_are_those_of_transformers(loaded: LoadedModel, reference: Any) -> None:
    """After every prompt, in chunks, the logits are transformers' within the rounding of the half type."""
    model = loaded.model
    worst = 0.0
    for prompt in all_prompts(loaded.tokenizer):
        driver = Driver(model, num_blocks=len(prompt) // 16 + 3)
        for start in range(0, len(prompt), CHUNK_TOKENS):
            found = driver.step({"a": prompt[start : start + CHUNK_TOKENS]})["a"]
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt], device=CUDA)).logits[0, -1].float()
        error = ((found - expected).norm() / expected.norm()).item()
        worst = max(worst, error)
        assert error < TOLERANCES[model.dtype], len(prompt)
    print(f"{model.dtype}: largest error {worst:.4f}")


def requests(wanted: Sequence[Sequence[int]], num_requests: int, *, seed: int) -> list[Request]:
    """Greedy requests for these prompts, each as often as it comes round."""
    rng = random.Random(seed)
    return [
        Request(
            f"{seed}-{index}",
            tuple(wanted[index % len(wanted)]),
            rng.randint(8, 64),
            sampling=SamplingParams(temperature=0.0),
            stop=StopParams(ignore_eos=True),
            omit_text=True,
        )
        for index in range(num_requests)
    ]


async def check(served: Service, loaded: LoadedModel, wanted: list[Request], *, at_once: int) -> int:
    """Serves all twice, eagerly and as the cache has it; the texts must agree. Returns how many were exactly equal."""
    expected = await served.complete_all([eager(request) for request in wanted], at_once=at_once)
    found = await served.complete_all(wanted, at_once=at_once)
    tie = TIES[loaded.model.dtype]
    for request, ours, theirs in zip(wanted, found, expected, strict=True):
        assert same_or_tied(loaded.model, request, ours.ids, theirs.ids, tie=tie), request.request_id
    return sum(ours.ids == theirs.ids for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("at_once", [1, 8, 64])
async def test_graphs_say_what_eager_steps_say(loaded: LoadedModel, at_once: int) -> None:
    """Up to 64 clients that come and go: the same greedy text eagerly, while graphs are captured, and through them."""
    wanted = requests(all_prompts(loaded.tokenizer), 38 if at_once == 1 else 96, seed=at_once)
    async with service(loaded.model) as served:
        first = await check(served, loaded, wanted, at_once=at_once)
        await served.settle()
        second = await check(served, loaded, wanted, at_once=at_once)
        stats = served.engine.graphs.stats()
        print(f"{loaded.model.dtype} {at_once} at once: {first} and {second} of {len(wanted)} equal, {stats}")
        assert stats.num_hits > 0
        assert stats.num_failures == 0
        assert not served.engine.graphs.list([GraphState.QUARANTINED])


@pytest.mark.parametrize("at_once", [1, 8, 64])
async def test_every_step_gives_the_tokens_of_its_eager_run(loaded: LoadedModel, at_once: int) -> None:
    """Up to 64 clients that come and go, while graphs are captured and then through them: the same batches run eagerly give
    the same tokens, all of them."""
    wanted = requests(all_prompts(loaded.tokenizer), 38 if at_once == 1 else 96, seed=100 + at_once)
    async with service(loaded.model) as served:
        steps = trace(served.engine)
        await served.complete_all(wanted, at_once=at_once)
        await served.settle()
        num_before = len(steps)
        await served.complete_all([replace(one, request_id=f"{one.request_id}-2") for one in wanted], at_once=at_once)
    await retrace(loaded.model, steps)
    # How many of the first ones are graphs is a matter of time: beside steps captures take turns with them.
    is_graph = [step.graph is not None for step in steps]
    num_after = len(steps) - num_before
    print(
        f"{loaded.model.dtype} {at_once} at once: graphs ran {sum(is_graph[:num_before])} of {num_before} steps while they were"
    )
    print(f"captured, {sum(is_graph[num_before:])} of {num_after} after that")
    assert sum(is_graph[num_before:]) > num_after // 2


async def test_graphs_that_come_and_go_say_the_same(loaded: LoadedModel) -> None:
    """With room for few graphs, captured and evicted all the time."""
    async with service(loaded.model, graphs=GraphSettings(stall_budget_seconds=1.0, policy="lru")) as served:
        cache = served.engine.graphs
        await served.settle()
        for info in cache.list([GraphState.READY]):
            cache.unpin(info.name)
        # What a few decode graphs hold: the first graph of all grew the pool, and counts for many.
        sizes = sorted(info.size_bytes for info in cache.list([GraphState.READY]))
        cache.update_budget(limit_bytes=6 * sizes[len(sizes) // 2])
        steps = trace(served.engine)
        wanted = all_prompts(loaded.tokenizer)
        for seed in range(4):
            await check(served, loaded, requests(wanted, 48, seed=seed), at_once=24)
            await served.settle()  # what this round asked for
        stats = cache.stats()
        print(stats)
        assert stats.num_evictions > 40
        assert not cache.list([GraphState.QUARANTINED])
    await retrace(loaded.model, steps)
