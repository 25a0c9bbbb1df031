"""Sampling written the slow way: one row, plain Python numbers, a full sort. What the kernels must equal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

MASK = 0xFFFFFFFF


def finalise(value: int) -> int:
    """MurmurHash3's 32-bit finaliser."""
    value ^= value >> 16
    value = value * 0x85EBCA6B & MASK
    value ^= value >> 13
    value = value * 0xC2B2AE35 & MASK
    return value ^ (value >> 16)


def row_keys(seed: int, position: int) -> list[int]:
    """The three keys of a row."""
    keys = []
    for key in (0x243F6A88, 0x85A308D3, 0x13198A2E):
        for word in (seed & MASK, seed >> 32, position & MASK):
            key = finalise((5 * key + 0xE6546B64 + 0xCC9E2D51 * word) & MASK)
        keys.append(key)
    return keys


def gumbel(seed: int, position: int, token_id: int) -> float:
    """The noise of one token."""
    first, second, third = row_keys(seed, position)
    high = (0x9E3779B1 * token_id + first) & MASK
    high ^= high >> 16
    high = high * 0x85EBCA6B & MASK
    low = 0x27D4EB2F * (high ^ third) & MASK
    signed_low = low - (1 << 32) if low >= 1 << 31 else low
    high ^= second
    high ^= high >> 13
    high = high * 0xC2B2AE35 & MASK
    high ^= high >> 16
    fraction = signed_low * 2.0**-32 * (1 - 2.0**-20) + 0.5
    uniform = min((high + fraction) * 2.0**-32, 1 - 2.0**-24)
    return -math.log(-math.log1p(-uniform))


def penalise(
    logits: Sequence[float],
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    bias: Mapping[int, float] | None = None,
    prompt: Sequence[int] = (),
    completion: Sequence[int] = (),
    banned: Sequence[int] = (),
) -> list[float]:
    """Logits after penalties, bias and bans."""
    counts = Counter(completion)
    result = []
    for token_id, logit in enumerate(logits):
        if token_id in counts or token_id in prompt:
            logit = logit / repetition if logit > 0 else logit * repetition
        if token_id in counts:
            logit -= presence
        logit -= frequency * counts[token_id]
        logit += (bias or {}).get(token_id, 0.0)
        result.append(-math.inf if token_id in banned else logit)
    return result


def kept_tokens(logits: Sequence[float], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The tokens that top-k, top-p and min-p leave, of logits already divided by temperature. Equal logits stay together."""
    ranked = sorted(range(len(logits)), key=lambda token_id: -logits[token_id])
    if 0 < top_k < len(ranked):
        least = logits[ranked[top_k - 1]]
        ranked = [token_id for token_id in ranked if logits[token_id] >= least]
    largest = logits[ranked[0]]
    if top_p < 1:
        weights = [math.exp(logits[token_id] - largest) for token_id in ranked]
        goal, running = top_p * math.fsum(weights), 0.0
        for token_id, weight in zip(list(ranked), weights, strict=True):
            running += weight
            if running >= goal:
                least = logits[token_id]
                ranked = [other for other in ranked if logits[other] >= least]
                break
    return {token_id for token_id in ranked if math.exp(logits[token_id] - largest) >= min_p}


def sample(
    logits: Sequence[float],
    *,
    temperature: float,
    seed: int,
    position: int,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """The next token."""
    if temperature == 0:
        return max(range(len(logits)), key=lambda token_id: (logits[token_id], -token_id))
    scaled = [logit / temperature for logit in logits]
    kept = kept_tokens(scaled, top_k=top_k, top_p=top_p, min_p=min_p)
    return max(kept, key=lambda token_id: (scaled[token_id] + gumbel(seed, position, token_id), -token_id))
