"""The check that stands behind every benchmark."""

from __future__ import annotations

import random

from benchmarks.gpu.models import random_prompt
from benchmarks.gpu.oracle import Oracle
from hotgraph_server.request import SamplingParams
from tests.benchmarks.conftest import Serve

KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=5),
    SamplingParams(temperature=1.1, top_k=20, top_p=0.9, seed=6),
    SamplingParams(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.3, seed=7),
]


async def test_served_tokens_are_accepted_and_others_are_not(serve: Serve) -> None:
    """Of every kind of sampling: the result passes, also cut short; with one token changed it does not."""
    source = random.Random(3)
    async with serve() as service:
        oracle = Oracle(service)
        for sampling in KINDS:
            request = service.request(random_prompt(30, 512, source), 10, sampling=sampling)
            ids = (await service.complete(request)).token_ids
            for length in (10, 4):
                verdict = await oracle.check(request, ids[:length])
                assert (verdict.mismatch, verdict.num_tokens) == (None, length)
            wrong = [*ids[:5], (ids[5] + 1) % 512, *ids[6:]]
            found = (await oracle.check(request, wrong)).mismatch
            assert found is not None
            assert "completion token 5" in found


async def test_level_tokens_are_accepted_and_what_follows_is_still_checked(serve: Serve) -> None:
    """With a tolerance that makes any two tokens level, one other token passes, and the rest is that of its text."""
    source = random.Random(4)
    async with serve() as service:
        oracle = Oracle(service, tolerance=100.0)
        request = service.request(random_prompt(25, 512, source), 8)
        ids = tuple((await service.complete(request)).token_ids)
        other = (*ids[:3], (ids[3] + 1) % 512)
        branch = await oracle.expected(request, other)
        verdict = await oracle.check(request, branch)
        assert (verdict.num_ties, verdict.mismatch) == (1, None)
        strict = await Oracle(service).check(request, branch)
        assert strict.mismatch is not None


async def test_too_many_tokens_are_a_mismatch(serve: Serve) -> None:
    """Nothing may come after the tokens that were asked for."""
    async with serve() as service:
        request = service.request(random_prompt(12, 512, random.Random(5)), 4)
        ids = (await service.complete(request)).token_ids
        assert (await Oracle(service).check(request, [*ids, 1])).mismatch == "more tokens than were asked for"
