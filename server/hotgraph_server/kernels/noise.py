"""Gumbel noise as a pure function of (seed, position, token id): no generator, no state, the same in any batch and slot.

How a number is made (our own chain, of the 32-bit finaliser of MurmurHash3 by Austin Appleby, public domain: shifts 16, 13,
16 and the multipliers 0x85EBCA6B, 0xC2B2AE35). All arithmetic is modulo 2**32.

1. Row keys. Three lanes start from different constants; each takes in the seed's low word, its high word and the position,
   one after the other: key = finalise(5 * key + 0xE6546B64 + 0xCC9E2D51 * word). Gives keys a, b, c.
2. Element. x = 0x9E3779B1 * token + a; x ^= x >> 16; x *= 0x85EBCA6B. Then the high word: h = finalise's rest on x ^ b, and
   the low word: l = 0x27D4EB2F * (x ^ c). Without the second key the noise of two rows whose first keys are a multiple of
   the token's multiplier apart would be shifted copies of each other.
3. Uniform. v = (h + fraction(l)) / 2**32, where fraction(l) in (0, 1) is (l as signed) / 2**32 + 1/2. As float32 numbers are
   dense near 0, v reaches down to 2**-53: the tail of likely winners is not cut off at 2**-24 or 2**-32.
4. Noise. -log(-log1p(-v)), so that small v (which float32 holds exactly) are the large noises.

Near 1 v is held to 1 - 2**-24, which only makes the smallest noises, those of tokens that lose anyway, a little larger.
"""

from __future__ import annotations

import numpy as np
import torch

_MASK = 0xFFFFFFFF
_LANES = (0x243F6A88, 0x85A308D3, 0x13198A2E)  # digits of pi
_CHUNK_ELEMENTS = 1 << 17  # what stays in a core's second-level cache with its scratch


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


_TOKEN_FACTOR = _signed(0x9E3779B1)
_FIRST_FACTOR = _signed(0x85EBCA6B)
_SECOND_FACTOR = _signed(0xC2B2AE35)
_LOW_FACTOR = 0x27D4EB2F
_FRACTION_SCALE = 2.0**-32 * (1 - 2.0**-20)  # keeps the fraction off 0 when the low word is its least
_LARGEST_UNIFORM = 1 - 2.0**-24


def _finalise(value: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser on 32-bit values held in int64."""
    value = value ^ (value >> 16)
    value = (value * 0x85EBCA6B) & _MASK
    value = value ^ (value >> 13)
    value = (value * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The three keys of each row, int32 [R, 3]. `seeds`: int64 [R, 2], low and high word; `positions`: int64 [R]."""
    if seeds.device.type == "cpu":
        return _row_keys_on_host(seeds, positions)
    return _row_keys(seeds, positions)


def _row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    # Filled in on the device: a copy from the host could not be captured.
    keys = torch.stack([torch.full_like(positions, lane) for lane in _LANES], dim=1)
    for word in (seeds[:, 0], seeds[:, 1], positions & _MASK):
        keys = _finalise((keys * 5 + 0xE6546B64 + (word * 0xCC9E2D51).unsqueeze(1)) & _MASK)
    return torch.where(keys >= 1 << 31, keys - (1 << 32), keys).to(torch.int32)


def _row_keys_on_host(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The same with NumPy, whose overhead on so few numbers is a fraction of torch's."""
    keys = np.array(_LANES, dtype=np.uint32)
    words = np.stack((*seeds.numpy().T, positions.numpy())).astype(np.uint32) * np.uint32(0xCC9E2D51)
    for word in words:
        keys = keys * np.uint32(5) + np.uint32(0xE6546B64) + word[:, np.newaxis]
        keys ^= keys >> np.uint32(16)
        keys *= np.uint32(0x85EBCA6B)
        keys ^= keys >> np.uint32(13)
        keys *= np.uint32(0xC2B2AE35)
        keys ^= keys >> np.uint32(16)
    return torch.from_numpy(keys.view(np.int32))


def _noise(token_ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Noise of int32 token ids [C] or [R, C] under row keys [R, 3]: float32 [R, C]. Works in place on its scratch."""
    high = token_ids * _TOKEN_FACTOR + keys[:, 0:1]  # int32 products wrap, as meant
    shifted = torch.bitwise_right_shift(high, 16).bitwise_and_(0xFFFF)  # torch shifts the sign in: masked off
    high.bitwise_xor_(shifted).mul_(_FIRST_FACTOR)
    low = torch.bitwise_xor(high, keys[:, 2:3], out=shifted).mul_(_LOW_FACTOR)
    fraction = low.to(torch.float32).mul_(_FRACTION_SCALE).add_(0.5)
    high.bitwise_xor_(keys[:, 1:2])
    torch.bitwise_right_shift(high, 13, out=shifted).bitwise_and_(0x7FFFF)
    high.bitwise_xor_(shifted).mul_(_SECOND_FACTOR)
    torch.bitwise_right_shift(high, 16, out=shifted).bitwise_and_(0xFFFF)
    high.bitwise_xor_(shifted)
    # As a signed number the high word is in [-1/2, 1/2) of 2**32; what is below 0 belongs above 1/2.
    uniform = fraction.add_(high).mul_(2.0**-32)
    uniform.sub_(uniform.floor()).clamp_(max=_LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, vocabulary_size: int, token_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Standard Gumbel noise, float32: [R, vocabulary_size] for all tokens, or [R, C] for `token_ids` (int64 [R, C]).

    `seeds`: int64 [R, 2], the low and high 32 bits; `positions`: int64 [R], the index in the sequence of the token that is
    sampled. An element depends on nothing but its row's seed and position and its token id.
    """
    num_rows = seeds.shape[0]
    keys = row_keys(seeds, positions)
    if token_ids is not None:
        return _noise(token_ids.to(torch.int32), keys)
    everything = torch.arange(vocabulary_size, dtype=torch.int32, device=seeds.device)
    chunk_rows = max(1, _CHUNK_ELEMENTS // vocabulary_size) if seeds.device.type == "cpu" else num_rows
    if num_rows <= chunk_rows:
        return _noise(everything, keys)
    noise = torch.empty(num_rows, vocabulary_size, dtype=torch.float32, device=seeds.device)
    for start in range(0, num_rows, chunk_rows):
        noise[start : start + chunk_rows] = _noise(everything, keys[start : start + chunk_rows])
    return noise
