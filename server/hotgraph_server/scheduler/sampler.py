"""Which sampling a request needs of its steps: the least that can do it."""

from __future__ import annotations

from hotgraph_server.batch import Sampler
from hotgraph_server.request import Request

_RANK = {Sampler.GREEDY: 0, Sampler.GUMBEL: 1, Sampler.FILTERED: 2}


def sampler_of(request: Request, *, bans_stops: bool) -> Sampler:
    """The sampler for one row. `bans_stops`: min_tokens holds for the token that is sampled."""
    sampling = request.sampling
    needs_all = (
        sampling.has_filters
        or sampling.has_penalties
        or bool(sampling.logit_bias)
        or bans_stops
        or request.num_logprobs is not None
    )
    if needs_all:
        return Sampler.FILTERED
    return Sampler.GREEDY if sampling.is_greedy else Sampler.GUMBEL


def strongest(first: Sampler, second: Sampler) -> Sampler:
    """The one of two that can do what both can."""
    return first if _RANK[first] >= _RANK[second] else second
