"""The engine through CUDA graphs: what it answers is what it answers without them, whatever the cache is doing meanwhile."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import GPTNeoConfig, LlamaConfig

from graphcache import GraphState
from graphcache.backends.cuda import CudaBackend
from graphcache.backends.cuda_captured import CudaCaptured
from hotgraph_server.batch import Sampler, StepKey
from hotgraph_server.config import GraphSettings
from hotgraph_server.models.bridge import Bridge
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.interface import Model
from hotgraph_server.request import Request, SamplingParams, StopParams
from tests.gpu.retrace import retrace, trace
from tests.gpu.serving import TIES, Service, eager, same_or_tied, service
from tests.server.models.driver import random_model, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

CUDA = torch.device("cuda:0")
VOCABULARY = 8192
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=4096,
    pad_token_id=None,
)
LENGTHS = (
    1,
    2,
    3,
    7,
    15,
    16,
    17,
    31,
    33,
    48,
    64,
    65,
    100,
    127,
    128,
    129,
    200,
    256,
    300,
    500,
    511,
    513,
    700,
    1025,
    2000,
)


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> Model:
    return make(request.param)


@pytest.fixture(scope="module")
def half() -> Model:
    return make(torch.float16)


def make(dtype: torch.dtype) -> Model:
    """Six layers of SmolLM2's shape, random."""
    source = random_model(CONFIG)
    return Decoder.from_config(source.config, source.state_dict(), dtype=dtype, device=CUDA)


def requests(num_requests: int, *, seed: int = 0, sampling: SamplingParams | None = None) -> list[Request]:
    """Prompts of all lengths, completions of 4 to 40 tokens."""
    rng = random.Random(seed)
    return [
        Request(
            f"{seed}-{index}",
            tuple(random_tokens(LENGTHS[index % len(LENGTHS)], VOCABULARY, seed=1000 * seed + index)),
            rng.randint(4, 40),
            sampling=sampling or SamplingParams(temperature=0.0),
            stop=StopParams(ignore_eos=True),
            omit_text=True,
        )
        for index in range(num_requests)
    ]


async def check(served: Service, model: Model, wanted: list[Request], *, at_once: int) -> int:
    """Serves all twice, eagerly and as the cache has it; the texts must agree. Returns how many were exactly equal."""
    expected = await served.complete_all([eager(request) for request in wanted], at_once=at_once)
    found = await served.complete_all(wanted, at_once=at_once)
    for request, ours, theirs in zip(wanted, found, expected, strict=True):
        assert same_or_tied(model, request, ours.ids, theirs.ids), request.request_id
    return sum(ours.ids == theirs.ids for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("at_once", [3, 64])
async def test_every_step_gives_the_tokens_of_its_eager_run(model: Model, at_once: int) -> None:
    """Clients that come and go, while graphs are captured and then through them: the same batches run eagerly give the same
    tokens, all of them."""
    wanted = requests(75, seed=at_once)
    async with service(model) as served:
        steps = trace(served.engine)
        await served.complete_all(wanted, at_once=at_once)
        await served.settle()
        num_before = len(steps)
        await served.complete_all([replace(one, request_id=f"{one.request_id}-2") for one in wanted], at_once=at_once)
    await retrace(model, steps)
    # How many of the first ones are graphs is a matter of time: beside steps captures take turns with them.
    is_graph = [step.graph is not None for step in steps]
    num_after = len(steps) - num_before
    print(
        f"{model.dtype} {at_once} at once: graphs ran {sum(is_graph[:num_before])} of {num_before} steps while they were"
    )
    print(f"captured, {sum(is_graph[num_before:])} of {num_after} after that")
    assert sum(is_graph[num_before:]) > num_after // 2


@pytest.mark.parametrize("at_once", [1, 8, 64])
async def test_graphs_give_the_eager_tokens(model: Model, at_once: int) -> None:
    """Prompts of 1 to 2,000 tokens, coming and going: the same greedy tokens eagerly, while graphs are captured, and after."""
    async with service(model) as served:
        wanted = requests(25 if at_once == 1 else 75, seed=at_once)
        first = await check(served, model, wanted, at_once=at_once)
        await served.settle()
        before = served.engine.graphs.stats()
        second = await check(served, model, wanted, at_once=at_once)
        after = served.engine.graphs.stats()
        print(f"{model.dtype} {at_once} at once: {first} and {second} of {len(wanted)} equal, {after}")
        assert after.num_hits > before.num_hits
        assert after.num_failures == 0
        assert not served.engine.graphs.list([GraphState.QUARANTINED])


async def test_the_core_is_captured_first_and_kept(half: Model) -> None:
    """Right after the start the small shapes are captured and pinned."""
    async with service(half) as served:
        await served.settle()
        ready = {info.key: info for info in served.engine.graphs.list([GraphState.READY])}
        for tokens, rows in [(1, 1), (2, 2), (4, 4), (8, 8), (32, 1), (64, 1), (128, 1)]:
            for sampler in (Sampler.GREEDY, Sampler.GUMBEL):
                info = ready[StepKey(tokens, rows, sampler)]
                assert info.pin_expire_time is not None
                print(info.name, info.size_bytes, info.capture)


async def test_constant_eviction_changes_no_token(half: Model) -> None:
    """With room for few graphs, captured and evicted all the time, every text is the eager one and every graph verifies."""
    async with service(half, graphs=GraphSettings(stall_budget_seconds=1.0)) as served:
        cache = served.engine.graphs
        await served.settle()
        for info in cache.list([GraphState.READY]):
            cache.unpin(info.name)
        cache.update_budget(limit_bytes=cache.stats().used_bytes // 3)
        for seed in range(5):
            await check(served, half, requests(50, seed=100 + seed), at_once=24)
        stats = cache.stats()
        print(stats)
        assert stats.num_evictions > 20
        assert not cache.list([GraphState.QUARANTINED])


async def test_run_ahead_changes_no_token(half: Model) -> None:
    """Launching a step before the last one is read gives what one step at a time gives."""
    wanted = requests(50, seed=7)
    texts = []
    for run_ahead in (0, 1):
        async with service(half, run_ahead=run_ahead) as served:
            await served.settle()
            texts.append(await served.complete_all(wanted, at_once=8))
    for request, one, other in zip(wanted, *texts, strict=True):
        assert same_or_tied(half, request, one.ids, other.ids)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.8, seed=11),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, seed=12),
        SamplingParams(temperature=0.9, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, seed=13),
    ],
    ids=["gumbel", "filters", "penalties"],
)
async def test_seeded_sampling_through_graphs(sampling: SamplingParams) -> None:
    """Seeded requests give through graphs what they give eagerly; in float32, where rounding hardly ever decides."""
    model = make(torch.float32)
    async with service(model) as served:
        wanted = requests(25, seed=3, sampling=sampling)
        expected = await served.complete_all([eager(request) for request in wanted], at_once=8)
        await served.complete_all(wanted, at_once=8)
        await served.settle()
        found = await served.complete_all(wanted, at_once=8)
        assert any(completion.receipt.num_graph_steps for completion in found)
        num_equal = sum(one.ids == other.ids for one, other in zip(found, expected, strict=True))
        print(f"{num_equal} of {len(wanted)} equal")
        assert num_equal >= len(wanted) - 1


async def test_models_whose_work_the_host_shapes_run_without_graphs() -> None:
    """A model of transformers that computes texts anew is never captured, and gives transformers' own tokens."""
    own = random_model(
        GPTNeoConfig(
            vocab_size=300,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global"], 2]],
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model: Model = Bridge(torch.nn.Module.to(copy.deepcopy(own), CUDA))
    async with service(model, num_slots=8) as served:
        assert served.engine.graphs.backend.name == "eager"
        prompts = [random_tokens(length, 300, seed=length) for length in (1, 5, 17, 40)]
        wanted = [
            Request(
                f"r{index}",
                tuple(prompt),
                12,
                sampling=SamplingParams(temperature=0.0),
                stop=StopParams(ignore_eos=True),
                omit_text=True,
            )
            for index, prompt in enumerate(prompts)
        ]
        for _ in range(2):  # the second time what was asked for the first time is there
            found = await served.complete_all(wanted, at_once=4)
            await served.settle()
            for prompt, completion in zip(prompts, found, strict=True):
                text = list(prompt)
                for token_id in completion.ids:
                    logits = own(torch.tensor([text])).logits[0, -1]
                    assert logits.max() - logits[token_id] < TIES[torch.float32]
                    text.append(token_id)


class Sabotage(CudaBackend):
    """Every third capture breaks in the middle, in one of three ways."""

    num_captures = 0

    def capture(self, name: str, work: Callable[[], None]) -> CudaCaptured:
        self.num_captures += 1
        if self.num_captures % 3:
            return super().capture(name, work)

        def broken() -> None:
            work()
            way = self.num_captures // 3 % 3
            if way == 0:
                torch.ones(1, device=CUDA).item()  # waits for the device
            elif way == 1:
                torch.empty(1 << 45, dtype=torch.uint8, device=CUDA)
            else:
                raise ZeroDivisionError

        return super().capture(name, broken)


async def test_failed_captures_cost_no_answer(half: Model) -> None:
    """Captures that wait for the device, want too much memory or raise are failures of the cache, and of nothing else."""
    backend = Sabotage(CUDA)
    async with service(half, backend=backend) as served:
        for seed in range(2):
            await check(served, half, requests(50, seed=200 + seed), at_once=16)
        await served.settle()
        stats = served.engine.graphs.stats()
        print(stats, backend.num_captures)
        assert stats.num_failures >= 5
        assert stats.num_hits > 0
        await check(served, half, requests(25, seed=300), at_once=16)


async def test_a_new_shape_is_eager_once_and_a_hit_soon(half: Model) -> None:
    """A prompt of a shape that was never seen is answered at once, and its shape is a hit within a quarter of a second."""
    async with service(half) as served:
        await served.settle()
        cache = served.engine.graphs
        delays = []
        for length in (200, 270, 300, 350, 420, 500):
            request = Request(
                f"n{length}",
                tuple(random_tokens(length, VOCABULARY, seed=length)),
                1,
                sampling=SamplingParams(temperature=0.0),
                stop=StopParams(ignore_eos=True),
                omit_text=True,
            )
            key = served.engine.bucket(length, 1, Sampler.GREEDY)
            assert key is not None
            assert cache.lookup(key) is None
            await served.complete(request)
            begin = asyncio.get_running_loop().time()
            await asyncio.to_thread(cache.wait, [key], 5)
            assert cache.lookup(key) is not None
            delays.append(asyncio.get_running_loop().time() - begin)
        print("seconds until a hit:", [round(delay, 4) for delay in delays])
        assert sorted(delays)[len(delays) // 2] < 0.25
