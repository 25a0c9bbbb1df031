"""TorchEngine against a plain loop: dense forward, naive sampler, one sequence at a time."""

from __future__ import annotations

import math
import random

import pytest
import torch

from graphcache import FakeBackend
from hotgraph_server.batch import Sampler
from hotgraph_server.engine import TorchEngine
from hotgraph_server.errors import ModelLoadError, SettingsError
from hotgraph_server.request import SamplingParams
from tests.server.engine.conftest import MakeEngine, tiny_settings
from tests.server.engine.driver import Driver, Track
from tests.server.engine.tiny_model import CONTEXT, VOCABULARY, Tiny, TinyModel
from tests.server.kernels import naive_sampling


def reference(model: TinyModel, sequence: Track, num_tokens: int) -> list[int]:
    """The completion of a sequence, computed the slow way."""
    sampling = sequence.sampling
    known = [*sequence.prompt, *sequence.completion]
    while len(known) < len(sequence.prompt) + num_tokens:
        until, banned = sequence.banned_until or (0, ())
        logits = naive_sampling.penalise(
            model.dense(known).tolist(),
            repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
            bias=sampling.logit_bias,
            prompt=sequence.prompt,
            completion=known[len(sequence.prompt) :],
            banned=banned if len(known) < until else (),
        )
        known.append(
            naive_sampling.sample(
                logits,
                temperature=sampling.temperature,
                seed=sequence.seed,
                position=len(known),
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
            )
        )
    return known[len(sequence.prompt) :]


def random_sampling(rng: random.Random) -> SamplingParams:
    """Any mixture of what can be asked for."""
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 7, 30]),
        top_p=rng.choice([1.0, 1.0, 0.5, 0.95]),
        min_p=rng.choice([0.0, 0.0, 0.1]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=rng.choice([0.0, 0.0, 0.9, -0.7]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.4]),
        logit_bias=rng.choice([{}, {}, {3: 5.0, 90: -100.0, 0: 1.5}]),
    )


def random_sequence(rng: random.Random, sampling: SamplingParams | None = None) -> Track:
    """A prompt of any length, a seed, sometimes tokens banned for a while."""
    prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 5, 16, 33])))
    banned = rng.choice([None, (len(prompt) + 5, tuple(range(0, VOCABULARY, 2)))])
    return Track(
        prompt, sampling or random_sampling(rng), rng.getrandbits(64), banned_until=banned if sampling is None else None
    )


@pytest.mark.parametrize("kind", ["greedy", "gumbel", "everything"])
@pytest.mark.parametrize("chunk", [3, 100])
async def test_equals_the_reference_loop(make_engine: MakeEngine, kind: str, chunk: int) -> None:
    """Sequences that join at different steps, chunked or not, get the tokens of the plain loop for each alone."""
    rng = random.Random(f"{kind} {chunk}")
    model = TinyModel()
    engine = await make_engine(model)
    fixed = {"greedy": SamplingParams(temperature=0.0), "gumbel": SamplingParams(temperature=0.9), "everything": None}
    sequences = [random_sequence(rng, fixed[kind]) for _ in range(8)]
    expected = [reference(model, sequence, 12) for sequence in sequences]
    driver = Driver(engine)
    await driver.run(sequences, 12, chunk=chunk)
    assert [sequence.completion for sequence in sequences] == expected
    assert {output.receipt.phase.value for output in driver.outputs} == {"prefill", "decode", "mixed"}


async def test_seeded_tokens_are_the_same_alone_and_among_others(make_engine: MakeEngine) -> None:
    """A seeded request gives the same tokens alone and among seven others, in whatever slot."""
    rng = random.Random(3)
    sequences = [random_sequence(rng, SamplingParams(temperature=1.0, top_p=0.9)) for _ in range(8)]
    engine = await make_engine()
    alone = []
    for sequence in sequences:
        copy = Track(sequence.prompt, sequence.sampling, sequence.seed)
        await Driver(engine, seed=1).run([copy], 10)
        alone.append(copy.completion)
    await Driver(engine, seed=2).run(sequences, 10)
    assert [sequence.completion for sequence in sequences] == alone
    assert len({tuple(completion) for completion in alone}) == 8


@pytest.mark.parametrize("needs_verification", [False, True])
async def test_padded_equals_exact(make_engine: MakeEngine, needs_verification: bool) -> None:
    """Steps that compute their whole bucket give the tokens and log-probabilities of exact ones, in fixed shapes too."""
    results = []
    for options in (
        {"padding": "never"},
        {"padding": "always"},
        {"padding": "auto", "backend": FakeBackend(needs_verification=needs_verification), "num_blocks": 600},
    ):
        rng = random.Random(17)
        model = TinyModel()
        engine = await make_engine(model, **options)
        # Twice, so that the second time graphs are there.
        for _ in range(2):
            sequences = [random_sequence(rng) for _ in range(7)]
            driver = Driver(engine)
            await driver.run(sequences, 9, chunk=7, num_logprobs=3)
            wanted = [engine.bucket(o.receipt.num_tokens, o.receipt.num_rows, Sampler.FILTERED) for o in driver.outputs]
            for key in wanted:
                assert key is not None
                engine.graphs.request(key)
            engine.graphs.wait([key for key in wanted if key is not None], 20)
        assert all(output.receipt.graph for output in driver.outputs)
        is_padded = [o.receipt.tokens_bucket > o.receipt.num_tokens for o in driver.outputs]
        assert any(is_padded) == (options["padding"] != "never")
        shapes = [(o.receipt.tokens_bucket, o.receipt.rows_bucket) for o in driver.outputs]
        assert set(shapes) <= set(model.shapes)
        results.append(sequences)
    for other in results[1:]:
        assert [sequence.completion for sequence in other] == [sequence.completion for sequence in results[0]]
        for mine, its in zip(results[0], other, strict=True):
            for a, b in zip(mine.logprobs, its.logprobs, strict=True):
                assert a is not None
                assert b is not None
                assert a.chosen[1] == pytest.approx(b.chosen[1], abs=1e-4)
                assert [token_id for token_id, _ in a.top] == [token_id for token_id, _ in b.top]


async def test_slot_reuse_leaks_nothing(make_engine: MakeEngine) -> None:
    """A sequence in a slot that had penalties, bias, bans and another table before gives the tokens of a fresh engine."""
    model = TinyModel()
    engine = await make_engine(model, num_slots=1)
    heavy = SamplingParams(
        temperature=1.5, top_k=3, repetition_penalty=5.0, presence_penalty=2.0, logit_bias={5: 100.0, 6: -100.0}
    )
    light = SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.5)
    rng = random.Random(1)
    for sampling in (heavy, light, heavy, SamplingParams(temperature=0.8), SamplingParams(temperature=0.0)):
        sequence = random_sequence(rng, sampling)
        if sampling is heavy:
            sequence.banned_until = (1000, (1, 2, 3))
        expected = reference(model, sequence, 8)
        await Driver(engine).run([sequence], 8, sampler=Sampler.FILTERED)
        assert sequence.completion == expected


async def test_preempted_sequence_goes_on_with_the_same_text(make_engine: MakeEngine) -> None:
    """A sequence that lost its slot and is computed again from its tokens continues as if nothing had been."""
    model = TinyModel()
    engine = await make_engine(model)
    sampling = SamplingParams(temperature=1.0, top_k=20, repetition_penalty=1.3, frequency_penalty=0.3)
    sequence = Track((5, 9, 9, 40), sampling, seed=2**63 + 5)
    expected = reference(model, sequence, 14)
    for num_tokens in (4, 5, 14):
        await Driver(engine, seed=num_tokens).run([sequence], num_tokens, chunk=3)
    assert sequence.completion == expected


async def test_logprobs_are_the_models_own(make_engine: MakeEngine) -> None:
    """Log-probabilities are of the raw logits whatever the sampling, chosen token and likeliest, and absent when not asked."""
    model = TinyModel()
    engine = await make_engine(model)
    sampling = SamplingParams(temperature=1.8, top_k=40, presence_penalty=1.5, logit_bias={7: 3.0})
    sequence = Track((1, 2, 3), sampling, seed=4)
    driver = Driver(engine)
    await driver.run([sequence], 6, num_logprobs=5, chunk=2)
    known = list(sequence.prompt)
    for token_id, logprobs in zip(sequence.completion, sequence.logprobs, strict=True):
        expected = torch.log_softmax(model.dense(known), dim=0)
        assert logprobs is not None
        assert logprobs.chosen[0] == token_id
        assert logprobs.chosen[1] == pytest.approx(expected[token_id].item(), abs=1e-4)
        values, ids = expected.topk(5)
        assert [i for i, _ in logprobs.top] == ids.tolist()
        assert [value for _, value in logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)
        known.append(token_id)
    assert driver.outputs[0].logprobs == [None]  # the first chunk samples nothing
    without = Track((1, 2, 3), sampling, seed=4)
    quiet = Driver(engine)
    await quiet.run([without], 6)
    assert without.completion == sequence.completion
    assert all(not output.logprobs for output in quiet.outputs)


async def test_row_that_is_not_finite_fails_alone(make_engine: MakeEngine) -> None:
    """A row with NaN logits is reported and gives no token; the rows beside it go on as in the reference."""
    model = TinyModel()
    engine = await make_engine(model)
    good = [Track((4, 4), seed=1), Track((8, 9), SamplingParams(temperature=1.0), seed=2)]
    expected = [reference(model, sequence, 5) for sequence in good]
    model.nan_token = next(token for token in range(VOCABULARY) if all(token not in e for e in expected))
    bad = Track((1, model.nan_token), SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2))
    driver = Driver(engine)
    await driver.run([good[0], bad, good[1]], 5)
    assert bad.has_failed
    assert bad.completion == []
    assert [sequence.completion for sequence in good] == expected
    assert sum(len(output.failed_rows) for output in driver.outputs) == 1


async def test_info_tells_what_there_is(make_engine: MakeEngine) -> None:
    """Sizes in the info are those of the settings and the model; the context is cut to the blocks that exist."""
    engine = await make_engine(num_blocks=10, block_size=4, run_ahead=1)
    info = engine.info
    assert (info.model_id, info.architecture, info.runner, info.dtype) == (
        "tiny",
        "TinyForCausalLM",
        "decoder",
        "float32",
    )
    assert (info.num_blocks, info.block_size, info.context_length) == (10, 4, 36)
    assert info.kv_cache_bytes == 10 * 4 * 256
    assert (info.num_slots, info.max_step_tokens, info.run_ahead) == (8, 48, 1)
    assert info.vocabulary_size == VOCABULARY
    assert info.device == "cpu"
    assert info.device_name
    assert engine.graphs.budget().kv_cache_bytes == info.kv_cache_bytes
    wide = await make_engine(num_blocks=400)
    assert wide.info.context_length == CONTEXT
    short = await make_engine(num_blocks=400, max_context=50)
    assert short.info.context_length == 50


async def test_last_block_and_whole_context_can_be_used(make_engine: MakeEngine) -> None:
    """A sequence as long as the context the engine offers equals the reference to its last token."""
    model = TinyModel()
    engine = await make_engine(model, num_blocks=9, block_size=4)
    sequence = Track(tuple(range(20)))
    expected = reference(model, sequence, 13)
    await Driver(engine).run([sequence], 13)
    assert len(sequence.prompt) + len(sequence.completion) == engine.info.context_length + 1
    assert sequence.completion == expected


async def test_pool_too_small_is_refused() -> None:
    """A KV cache without room for two blocks beside the scratch block is a ModelLoadError, and leaves no thread behind."""
    engine = TorchEngine(Tiny(), tiny_settings(num_blocks=2))
    with pytest.raises(ModelLoadError, match="too small"):
        await engine.start()
    await engine.close()


def test_no_padding_with_fixed_shapes_is_refused() -> None:
    """padding "never" contradicts a backend whose graphs have a fixed shape."""
    with pytest.raises(SettingsError, match="fixed shape"):
        TorchEngine(Tiny(), tiny_settings(padding="never"), backend=FakeBackend())


def test_reference_uses_the_bans() -> None:
    """The reference itself bans: else the tests above would compare nothing."""
    model = TinyModel()
    free = reference(model, Track((1, 2)), 1)[0]
    assert reference(model, Track((1, 2), banned_until=(3, (free,))), 1)[0] != free
    assert not math.isnan(model.dense([1, 2]).sum().item())
