"""What the Triton kernels of matrix products for few rows share: which rows a program has, and what stands behind a product.

*Sums* (`few_rows_sums.py`) serves one and two rows on the ordinary cores; *dots* (`few_rows_dots.py`) serves up to 16 on the
tensor cores; *norm* (`few_rows_norm.py`) prepares the rows that *dots* reads. They know one product, no model. Weights are read
once and from memory, so all in them serves to keep many of their loads in flight.

With `PDL` a kernel is launched before the one in front of it in the stream has ended (programmatic dependent launch). Up to
`gdc_wait` it reads only what no kernel writes: weights. All its programs wait, so whoever waits for it waits for all before.

Names: a weight has N rows of K inputs; a tile is the part of K that is loaded at once; a half is 8 rows, or 8 tokens, as the
tensor cores take them. What is marked tl.constexpr follows from the weight and a launch's table, and from the number of rows
only as far as there are four kernels: for one, for two, for up to 8 and for up to 16.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]  # it comes without types
import triton.language as tl  # type: ignore[import-untyped]  # as above


@triton.jit  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def active(gate: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The activations of `activation.py`, of float32."""
    if ACTIVATION == "silu":
        result = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2u; 1.59577 is twice the root of 2/pi.
        result = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        tl.static_assert(ACTIVATION == "relu")
        result = tl.where(gate < 0.0, 0.0, gate)  # not a number stays so
    return result


@triton.jit  # type: ignore[untyped-decorator]
def weight_rows(local: tl.tensor, BLOCK_ROWS: tl.constexpr, DISTANCE: tl.constexpr) -> tl.tensor:
    """The weight's rows of this program. Rows that make a pair, DISTANCE apart, are neighbours here; 0 says that none do."""
    rows = tl.program_id(0) * BLOCK_ROWS + local
    if DISTANCE > 0:
        pairs = rows // 2
        rows = pairs // DISTANCE * (2 * DISTANCE) + pairs % DISTANCE + rows % 2 * DISTANCE
    return rows


@triton.jit  # type: ignore[untyped-decorator]
def existing_rows(local: tl.tensor, N: tl.constexpr, BLOCK_ROWS: tl.constexpr) -> tl.tensor:
    """Which of them exist; None says all."""
    is_row = None
    if N % BLOCK_ROWS != 0:
        is_row = tl.program_id(0) * BLOCK_ROWS + local < N
    return is_row


@triton.jit  # type: ignore[untyped-decorator]
def store_product(
    out: tl.tensor,
    product: tl.tensor,
    biases: tl.tensor,
    residual: tl.tensor,
    num_tokens: tl.tensor,
    N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """product: float32 [BLOCK_TOKENS, BLOCK_ROWS]. Rounds where the kernels do that one after the other would store."""
    dtype = out.dtype.element_ty
    if biases is not None:
        product += biases[None, :].to(tl.float32)
    columns: tl.constexpr = BLOCK_ROWS if ACTIVATION is None else BLOCK_ROWS // 2
    if ACTIVATION is None:
        result = product.to(dtype)
    else:
        gate, up = tl.split(tl.reshape(product.to(dtype).to(tl.float32), (BLOCK_TOKENS, columns, 2)))
        result = (active(gate, ACTIVATION).to(dtype).to(tl.float32) * up).to(dtype)
    token = tl.arange(0, BLOCK_TOKENS)[:, None]
    column = tl.program_id(0) * columns + tl.arange(0, columns)[None, :]
    width: tl.constexpr = N if ACTIVATION is None else N // 2
    place = token * width + column
    mask = (token < num_tokens) & (column < width)
    if residual is not None:
        # `residual` may be `out`: each element is read and written by this program alone.
        result = (result.to(tl.float32) + tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    tl.store(out + place, result, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def load_turns(
    positions: tl.tensor,
    kv_indices: tl.tensor,
    table: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tl.tuple:
    """Of each token and pair of rows the cosine and the sine, [BLOCK_TOKENS, pairs], and of each token its slot."""
    half: tl.constexpr = HEAD_DIM // 2
    token = tl.arange(0, BLOCK_TOKENS)[:, None]
    is_token = token < num_tokens
    pair = tl.program_id(0) * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_ROWS // 2)[None, :]
    line = tl.load(positions + token, mask=is_token, other=0) * HEAD_DIM + pair % half
    slot = tl.load(kv_indices + token, mask=is_token, other=0)
    return tl.load(table + line), tl.load(table + line + half), slot


@triton.jit  # type: ignore[untyped-decorator]
def store_heads(
    out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    product: tl.tensor,
    biases: tl.tensor,
    turns: tl.tuple,
    num_tokens: tl.tensor,
    N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> None:
    """Turned queries to `out`, turned keys and values to their slots; rounded as in `rope_kv.py`."""
    half: tl.constexpr = HEAD_DIM // 2
    num_heads: tl.constexpr = N // HEAD_DIM - 2 * NUM_KV_HEADS
    dtype = out.dtype.element_ty
    if biases is not None:
        product += biases[None, :].to(tl.float32)
    first, second = tl.split(tl.reshape(product.to(dtype).to(tl.float32), (BLOCK_TOKENS, BLOCK_ROWS // 2, 2)))
    token = tl.arange(0, BLOCK_TOKENS)[:, None]
    pair = tl.program_id(0) * (BLOCK_ROWS // 2) + tl.arange(0, BLOCK_ROWS // 2)[None, :]
    head, column = pair // half, pair % half
    cosine, sine = turns[0].to(dtype).to(tl.float32), turns[1].to(dtype).to(tl.float32)
    # The first product is rounded before the second is added, as `apply_rope` does.
    turned_first = (first * cosine).to(dtype).to(tl.float32) - second * sine
    turned_second = (second * cosine).to(dtype).to(tl.float32) + first * sine
    is_turned = head < num_heads + NUM_KV_HEADS
    first = tl.where(is_turned, turned_first, first).to(dtype)
    second = tl.where(is_turned, turned_second, second).to(dtype)
    is_there = (token < num_tokens) & (pair < N // 2)
    kv_place = (turns[2] * NUM_KV_HEADS - num_heads) * HEAD_DIM + column
    # Only one of the three happens for a head.
    is_stored = is_there & (head < num_heads)
    place = out + (token * num_heads + head) * HEAD_DIM + column
    tl.store(place, first, mask=is_stored)
    tl.store(place + half, second, mask=is_stored)
    is_stored = is_there & (head >= num_heads) & is_turned
    place = keys + kv_place + head * HEAD_DIM
    tl.store(place, first, mask=is_stored)
    tl.store(place + half, second, mask=is_stored)
    is_stored = is_there & (head >= num_heads + NUM_KV_HEADS)
    place = values + kv_place + (head - NUM_KV_HEADS) * HEAD_DIM
    tl.store(place, first, mask=is_stored)
    tl.store(place + half, second, mask=is_stored)


@triton.jit  # type: ignore[untyped-decorator]
def appended(tiles: tl.tuple, tile: tl.tensor) -> tl.tuple:
    return tiles + (tile,)  # noqa: RUF005  # Triton knows no unpacking
