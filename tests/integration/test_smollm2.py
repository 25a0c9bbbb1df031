"""The real model says, through scheduler and engine, what transformers says: token for token."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hotgraph_server.config import (
    GraphSettings,
    KvCacheSettings,
    ModelSettings,
    SchedulerSettings,
    Settings,
)
from hotgraph_server.engine import TorchEngine
from hotgraph_server.models import LoadedModel, load_model
from hotgraph_server.request import Request, SamplingParams, StopParams, TokensEvent
from hotgraph_server.scheduler import Scheduler
from hotgraph_server.scheduler.blocks import BlockManager, BlockTable

from .texts import prompts

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_TOKENS = 64
NUM_ALONE = 24  # a step for one takes as long as one for eight
GREEDY = SamplingParams(temperature=0.0)

Prompts = Sequence[tuple[int, ...]]


@pytest.fixture(scope="module")
def loaded(smollm2_folder: Path) -> LoadedModel:
    return load_model(ModelSettings(source=str(smollm2_folder), device="cpu"))


@pytest.fixture(scope="module")
def all_prompts(loaded: LoadedModel) -> Prompts:
    return prompts(loaded.tokenizer)


async def complete(
    loaded: LoadedModel,
    wanted: Prompts,
    *,
    at_once: int,
    sampling: Sequence[SamplingParams] = (),
    max_step_tokens: int = 512,
    kv_tokens: int = 16384,
    num_tokens: int = NUM_TOKENS,
    graphs: GraphSettings | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Completions of all prompts with `at_once` of them in flight; and how often each was pre-empted."""
    layout = loaded.model.kv_layout
    token_bytes = sum(4 * layer.num_heads * (layer.key_dim + layer.value_dim) for layer in layout)
    settings = Settings(
        scheduler=SchedulerSettings(num_slots=at_once, max_step_tokens=max_step_tokens, prefix_caching=False),
        kv_cache=KvCacheSettings(size_bytes=kv_tokens * token_bytes),
        graphs=graphs or GraphSettings(),
    )
    engine = TorchEngine(loaded, settings)
    await engine.start()
    scheduler = Scheduler(engine, loaded.tokenizer, settings.scheduler)
    await scheduler.start()

    async def one(index: int) -> tuple[list[int], int]:
        request = Request(
            f"r{index}",
            wanted[index],
            num_tokens,
            sampling=sampling[index] if sampling else GREEDY,
            stop=StopParams(ignore_eos=True),
            omit_text=True,
        )
        ids: list[int] = []
        num_preemptions = 0
        async with scheduler.submit(request) as stream:
            async for event in stream:
                if isinstance(event, TokensEvent):
                    ids += event.token_ids
                else:
                    num_preemptions = event.receipt.num_preemptions
        return ids, num_preemptions

    try:
        done = await asyncio.gather(*map(one, range(len(wanted))))
        return [ids for ids, _ in done], [num_preemptions for _, num_preemptions in done]
    finally:
        await scheduler.close()
        await engine.close()


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel, all_prompts: Prompts) -> list[list[int]]:
    """What eight at once say, which `test_eight_together` holds to transformers."""
    found, _ = asyncio.run(complete(loaded, all_prompts, at_once=8))
    return found


def assert_equal(found: list[list[int]], expected: list[list[int]], wanted: Prompts) -> None:
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert len(theirs) == NUM_TOKENS
        assert ours == theirs[: len(ours)], f"prompt {index} of {len(wanted[index])} tokens"


def test_there_are_enough_prompts(all_prompts: Prompts) -> None:
    """The comparison covers at least 32 different prompts of 1 to 700 tokens."""
    assert len(set(all_prompts)) == len(all_prompts) >= 32
    assert (min(map(len, all_prompts)), max(map(len, all_prompts))) == (1, 700)


def test_eight_together(
    smollm2_folder: Path, loaded: LoadedModel, all_prompts: Prompts, expected: list[list[int]]
) -> None:
    """Eight at once, joining and leaving at every step, say what transformers says.

    In float32, greedy, one prompt at a time, going on after the end of text. Its own generate would take minutes. Each of our
    tokens is the likeliest that it knows after those before, so it would have said the same.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    with torch.inference_mode():
        for prompt, ids in zip(all_prompts, expected, strict=True):
            assert len(ids) == NUM_TOKENS
            logits = model(torch.tensor([[*prompt, *ids[:-1]]]), logits_to_keep=NUM_TOKENS).logits[0]
            assert logits.argmax(dim=-1).tolist() == ids, f"a prompt of {len(prompt)} tokens"


async def test_alone(loaded: LoadedModel, all_prompts: Prompts, expected: list[list[int]]) -> None:
    """One request at a time gives the same, beyond the end of at least one block."""
    found, preemptions = await complete(loaded, all_prompts, at_once=1, num_tokens=NUM_ALONE)
    assert all(len(ids) == NUM_ALONE for ids in found)
    assert_equal(found, expected, all_prompts)
    assert not any(preemptions)


async def test_chunked_and_padded(loaded: LoadedModel, all_prompts: Prompts, expected: list[list[int]]) -> None:
    """Prompts cut into chunks of at most 48 tokens, mixed with up to 16 decode rows and padded to buckets, give the same."""
    found, _ = await complete(
        loaded, all_prompts, at_once=16, max_step_tokens=48, graphs=GraphSettings(padding="always")
    )
    assert_equal(found, expected, all_prompts)


async def test_too_few_blocks(loaded: LoadedModel, all_prompts: Prompts, expected: list[list[int]]) -> None:
    """With too few KV blocks for all, requests lose their place, are computed again, and give the same."""
    short = [index for index, prompt in enumerate(all_prompts) if len(prompt) <= 48]
    wanted = [all_prompts[index] for index in short]
    found, preemptions = await complete(loaded, wanted, at_once=8, kv_tokens=416)
    assert_equal(found, [expected[index] for index in short], wanted)
    assert any(preemptions)


async def test_preempted(
    loaded: LoadedModel, all_prompts: Prompts, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its length and at whatever token, a request that lost its place is computed again and gives the same."""
    has_room, asked = BlockManager.can_extend, itertools.count(1)

    def can_extend(self: BlockManager, table: BlockTable, num_tokens: int) -> bool:
        return next(asked) % 17 > 0 and has_room(self, table, num_tokens)  # a request asks once a token

    monkeypatch.setattr(BlockManager, "can_extend", can_extend)
    found, preemptions = await complete(loaded, all_prompts, at_once=1, num_tokens=NUM_ALONE)
    assert all(len(ids) == NUM_ALONE for ids in found)
    assert_equal(found, expected, all_prompts)
    assert all(preemptions)


async def test_seeded_alone_and_among_others(loaded: LoadedModel, all_prompts: Prompts) -> None:
    """A seeded request gives the same tokens alone and among seven others, whatever its filters and penalties."""
    wanted = all_prompts[8:16]
    kinds = (
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=1.0, top_p=0.9, seed=2),
        SamplingParams(temperature=1.2, top_k=40, min_p=0.02, seed=3),
        SamplingParams(temperature=0.7, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1, seed=4),
    )
    sampling = [kinds[index % len(kinds)] for index in range(len(wanted))]
    alone, _ = await complete(loaded, wanted, at_once=1, sampling=sampling, num_tokens=32)
    together, _ = await complete(loaded, wanted, at_once=8, sampling=sampling, num_tokens=32)
    assert together == alone
