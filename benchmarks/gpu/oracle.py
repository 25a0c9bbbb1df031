"""Whether the tokens of a request are those of the eager steps, run alone. The check behind every benchmark here.

In half precision two correct ways to compute a step (other kernels for another number of rows, padding) differ in the last
bits, and with random weights two tokens are often that near. So where tokens part, the eager step decides: with both tokens
moved towards each other by the dtype's tolerance (a logit bias, and as much for the bounds of top-p and min-p), it must choose
the other one. If it does, they were level, and what follows is compared with the eager steps after the token that was chosen.
If not, the result is wrong.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.models import TIE_TOLERANCES
from benchmarks.gpu.service import EAGER, Service
from hotgraph_server.request import Request


@dataclass(frozen=True, slots=True)
class Verdict:
    """`mismatch` is None when every token is an eager one; `num_ties`: how often two tokens were level."""

    num_tokens: int
    num_ties: int
    mismatch: str | None


class Oracle:
    """Runs requests eagerly, one at a time, and remembers what came. To be used while nothing else runs.

    `tolerance`: of a logit; the dtype's own by default.
    """

    def __init__(self, service: Service, tolerance: float | None = None) -> None:
        self._service = service
        dtype_name = service.engine.info.dtype
        by_name = {str(dtype).removeprefix("torch."): value for dtype, value in TIE_TOLERANCES.items()}
        self._tolerance = by_name[dtype_name] if tolerance is None else tolerance
        self._known: dict[tuple[object, ...], tuple[int, ...]] = {}
        self.num_runs = 0

    async def expected(self, request: Request, prefix: tuple[int, ...] = ()) -> tuple[int, ...]:
        """All tokens of the eager request, the first of which are `prefix`."""
        if len(prefix) >= request.max_tokens:
            return prefix
        key = (request.prompt_token_ids, request.max_tokens, repr(request.sampling), prefix)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = prefix + await self._run(request, prefix, request.max_tokens)
        return found

    async def check(self, request: Request, token_ids: Sequence[int]) -> Verdict:
        """Judges the tokens of a request, or its first ones."""
        num_ties = 0
        prefix: tuple[int, ...] = ()
        ids = tuple(token_ids)
        while True:
            expected = await self.expected(request, prefix)
            parts_at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), None)
            if parts_at is None:
                is_too_long = len(ids) > len(expected)
                return Verdict(len(ids), num_ties, "more tokens than were asked for" if is_too_long else None)
            found, wanted = ids[parts_at], expected[parts_at]
            if not await self._is_level(request, ids[:parts_at], found, wanted):
                place = f"{len(request.prompt_token_ids)} prompt tokens, completion token {parts_at}"
                return Verdict(len(ids), num_ties, f"{place}: {found} instead of {wanted}")
            num_ties += 1
            prefix = ids[: parts_at + 1]

    async def _is_level(self, request: Request, prefix: tuple[int, ...], found: int, wanted: int) -> bool:
        sampling = request.sampling
        bias = dict(sampling.logit_bias)
        bias[found] = bias.get(found, 0.0) + self._tolerance
        bias[wanted] = bias.get(wanted, 0.0) - self._tolerance
        # Which tokens top-p and min-p leave depends on all logits: their sums move by about as much as one logit does.
        factors = (1.0, math.exp(self._tolerance), math.exp(-self._tolerance))
        for top_p, min_p in itertools.product(
            {min(1.0, sampling.top_p * factor) for factor in factors} if sampling.top_p < 1 else {1.0},
            {sampling.min_p * factor for factor in factors},
        ):
            changed = dataclasses.replace(sampling, logit_bias=bias, top_p=top_p, min_p=min_p)
            tried = dataclasses.replace(request, sampling=changed)
            if await self._run(tried, prefix, len(prefix) + 1) == (found,):
                return True
        return False

    async def _run(self, request: Request, prefix: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """The tokens after `prefix`."""
        self.num_runs += 1
        asked = dataclasses.replace(
            request, request_id=f"oracle-{self.num_runs}", max_tokens=max_tokens, graph_policy=EAGER
        )
        if prefix:
            asked = dataclasses.replace(asked, resume={0: prefix})
        return tuple((await self._service.complete(asked)).token_ids)
