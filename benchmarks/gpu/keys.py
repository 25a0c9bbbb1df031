"""Which step graphs an engine has a shape for, found by asking it. It captures nothing."""

from __future__ import annotations

from benchmarks.gpu.service import Service
from hotgraph_server.batch import Sampler, StepKey


def step_keys(service: Service) -> list[StepKey]:
    """All of them: greedy before the other samplers; of each decode first, then lone prompts, then steps of more rows."""
    info = service.engine.info
    decode: list[tuple[int, int]] = [(rows, rows) for rows in range(1, info.num_slots + 1)]
    lone = [(tokens, 1) for tokens in range(2, info.max_step_tokens + 1)]
    mixed = [
        (tokens, rows)
        for rows in (2, 4, 8, 16, 32, 64)
        if rows <= info.num_slots
        for tokens in range(rows + 1, info.max_step_tokens + 1)
    ]
    found: dict[StepKey, None] = {}
    for sampler in (Sampler.GREEDY, Sampler.GUMBEL, Sampler.FILTERED):
        for tokens, rows in (*decode, *lone, *mixed):
            key = service.engine.bucket(tokens, rows, sampler)
            if key is not None:
                found[key] = None
    return list(found)
