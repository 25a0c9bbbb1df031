"""Model, sampling and engine on an NVIDIA GPU: the same functions as on the CPU, giving what they give there."""

from __future__ import annotations

import asyncio
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from hotgraph_server.config import GraphSettings, KvCacheSettings, SchedulerSettings, Settings
from hotgraph_server.engine import TorchEngine
from hotgraph_server.kernels.noise import gumbel_noise
from hotgraph_server.models.bridge import Bridge
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.interface import Model
from hotgraph_server.request import Request, SamplingParams, StopParams, TokensEvent
from hotgraph_server.scheduler import Scheduler
from hotgraph_server.text import ByteTokenizer
from tests.server.models.driver import Driver, random_model, random_tokens, reference_logits

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Of a row's logits, norm of the difference over norm, against float32 on the CPU: rounding, grown over four layers."""


def decoder(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Model:
    model = random_model(deepcopy(CONFIGS[name]))
    return Decoder.from_config(model.config, model.state_dict(), dtype=dtype, device=device, max_context=None)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    """Chunks, decode rows and mixed steps, padded, give transformers' float32 logits within the dtype's rounding."""
    reference = random_model(deepcopy(CONFIGS[name]))
    texts = {
        key: random_tokens(length, 1024, seed) for seed, (key, length) in enumerate({"a": 90, "b": 33, "c": 7}.items())
    }
    expected = {key: reference_logits(reference, text) for key, text in texts.items()}
    driver = Driver(decoder(name, CUDA, dtype), num_padding_tokens=3, num_padding_rows=2)
    position = dict.fromkeys(texts, 0)
    for step in ({"a": 50}, {"a": 39, "b": 30}, {"a": 1, "b": 1, "c": 5}, {"b": 1, "c": 1}, {"b": 1, "c": 1}):
        chunks = {key: texts[key][position[key] : position[key] + count] for key, count in step.items()}
        for key, logits in driver.step(chunks).items():
            position[key] += step[key]
            found = logits.cpu()
            wanted = expected[key][position[key] - 1]
            error = ((found - wanted).norm() / wanted.norm()).item()
            assert error < TOLERANCES[dtype], f"{key} in step {step}"


def test_the_bridge_gives_the_logits_of_the_cpu() -> None:
    """A model of transformers runs over the paged cache on the GPU, too."""
    reference = random_model(deepcopy(CONFIGS["llama"]))
    text = random_tokens(60, 1024, seed=3)
    expected = reference_logits(reference, text)
    model = random_model(deepcopy(CONFIGS["llama"]))
    model.to(CUDA)  # type: ignore[arg-type]  # its wrapper hides the method's signature
    driver = Driver(Bridge(model, max_context=None))
    for start, end in ((0, 40), (40, 59), (59, 60)):
        logits = driver.step({"a": text[start:end]})["a"].cpu()
        torch.testing.assert_close(logits, expected[end - 1], atol=2e-3, rtol=0)


def test_noise_is_the_same_on_every_device() -> None:
    """The hash is exact; what comes after it differs by rounding only."""
    seeds = torch.randint(0, 2**32, (5, 2), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0, 1, 17, 4095, 2**31])
    here = gumbel_noise(seeds, positions, 5000)
    there = gumbel_noise(seeds.to(CUDA), positions.to(CUDA), 5000).cpu()
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


@dataclass
class Loaded:
    model: Model
    model_id: str = "random"


async def complete(model: Model, requests: list[Request], *, at_once: int, padding: str = "auto") -> list[list[int]]:
    """Completions of all requests with `at_once` of them in flight."""
    settings = Settings(
        scheduler=SchedulerSettings(num_slots=at_once, max_step_tokens=64),
        kv_cache=KvCacheSettings(size_bytes=64 << 20),
        graphs=GraphSettings(padding=padding),  # type: ignore[arg-type]
    )
    engine = TorchEngine(Loaded(model), settings)
    await engine.start()
    scheduler = Scheduler(engine, ByteTokenizer(), settings.scheduler)
    await scheduler.start()

    async def one(request: Request) -> list[int]:
        ids: list[int] = []
        async with scheduler.submit(request) as stream:
            async for event in stream:
                if isinstance(event, TokensEvent):
                    ids += event.token_ids
        return ids

    try:
        return list(await asyncio.gather(*map(one, requests)))
    finally:
        await scheduler.close()
        await engine.close()


def requests(sampling: SamplingParams, *, num_requests: int = 16) -> list[Request]:
    lengths = [1, 2, 15, 16, 17, 40, 63, 64, 65, 100, 130, 200, 3, 9, 31, 77][:num_requests]
    return [
        Request(
            f"r{index}",
            tuple(random_tokens(length, 1024, seed=index)),
            32,
            sampling=sampling,
            stop=StopParams(ignore_eos=True),
            omit_text=True,
        )
        for index, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("padding", ["auto", "always"])
async def test_greedy_tokens_are_the_likeliest(padding: str) -> None:
    """Every greedy token of the engine on the GPU is the likeliest of float32 on the CPU, or ties with it by rounding."""
    reference = random_model(deepcopy(CONFIGS["llama"]))
    wanted = requests(SamplingParams(temperature=0.0))
    for request, ids in zip(
        wanted, await complete(decoder("llama", CUDA), wanted, at_once=8, padding=padding), strict=True
    ):
        logits = reference_logits(reference, [*request.prompt_token_ids, *ids])
        for index, token_id in enumerate(ids):
            row = logits[len(request.prompt_token_ids) + index - 1]
            assert row.max() - row[token_id] < 2e-3


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.8, seed=11),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, seed=12),
        SamplingParams(temperature=0.9, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, seed=13),
    ],
    ids=["gumbel", "filters", "penalties"],
)
async def test_seeded_tokens_are_the_same_alone_and_among_others(sampling: SamplingParams) -> None:
    """A seeded request gives on the GPU what it gives alone, with seven others in its steps."""
    model = decoder("llama", CUDA)
    wanted = requests(sampling, num_requests=8)
    assert await complete(model, wanted, at_once=8) == await complete(model, wanted, at_once=1)
