"""What stands behind a product in the Gluon kernel of `tile_rows.py`: activation, residual, rope and the write to the cache.

It knows what the tensor cores leave in the registers, not how it came there. Names as in `tile_rows_kernel.py`.
"""

from __future__ import annotations

from triton.experimental import gluon  # type: ignore[import-untyped]  # it comes without types
from triton.experimental.gluon import language as ttgl  # type: ignore[import-untyped]  # as above

from hotgraph_server.kernels.few_rows_parts import active as active_of_triton

# The same function, for Gluon's compiler.
_active = gluon.jit(active_of_triton.fn)


@gluon.constexpr_function  # type: ignore[untyped-decorator]  # Triton comes without types; so below
def _rows_first(num_rows: int, num_tokens: int, num_warps: int) -> ttgl.BlockedLayout:
    """[rows, tokens] with eight neighbouring rows a thread, which are neighbours in the result."""
    lanes = min(num_rows // 8, 32)
    warps = min(num_warps, max(num_tokens * lanes // 32, 1))
    return ttgl.BlockedLayout([8, 1], [lanes, 32 // lanes], [num_warps // warps, warps], [0, 1])


@gluon.constexpr_function  # type: ignore[untyped-decorator]
def _pairs_first(num_pairs: int, num_tokens: int, num_warps: int) -> ttgl.BlockedLayout:
    """[pairs, tokens, 2] alike, both of a pair in one thread."""
    flat = _rows_first(num_pairs, num_tokens, num_warps)
    return ttgl.BlockedLayout(
        [*flat.size_per_thread, 2], [*flat.threads_per_warp, 1], [*flat.warps_per_cta, 1], [2, 0, 1]
    )


@gluon.constexpr_function  # type: ignore[untyped-decorator]
def _stored(num_rows: int, num_tokens: int, num_warps: int, are_pairs: bool) -> ttgl.DistributedLayout:
    """[rows, tokens] as they are stored: of one product, or of what was made of pairs of products."""
    if are_pairs:
        return ttgl.SliceLayout(2, _pairs_first(num_rows, num_tokens, num_warps))
    return _rows_first(num_rows, num_tokens, num_warps)


@gluon.jit  # type: ignore[untyped-decorator]
def _split_pairs(product: ttgl.tensor, num_warps: ttgl.constexpr) -> ttgl.tuple:
    """[2 * pairs, tokens] → twice [pairs, tokens]: the upper half of the rows and the lower."""
    pairs: ttgl.constexpr = product.shape[0] // 2
    tokens: ttgl.constexpr = product.shape[1]
    halves = product.reshape((2, pairs, tokens)).permute((1, 2, 0))
    return ttgl.split(ttgl.convert_layout(halves, _pairs_first(pairs, tokens, num_warps)))


@gluon.jit  # type: ignore[untyped-decorator]
def store_product(
    out: ttgl.tensor,
    product: ttgl.tensor,
    bias: ttgl.tensor,
    residual: ttgl.tensor,
    num_tokens: ttgl.tensor,
    first_token: ttgl.tensor,
    first_row: ttgl.tensor,
    N: ttgl.constexpr,
    BOX_ROWS: ttgl.constexpr,
    ACTIVATION: ttgl.constexpr,
    num_warps: ttgl.constexpr,
) -> None:
    """product: float32 [tile's rows, tokens]. Rounds where the kernels do that one after the other would store."""
    dtype: ttgl.constexpr = out.dtype.element_ty
    tokens: ttgl.constexpr = product.shape[1]
    rows: ttgl.constexpr = product.shape[0] if ACTIVATION is None else product.shape[0] // 2
    width: ttgl.constexpr = N if ACTIVATION is None else N // 2
    layout: ttgl.constexpr = _stored(rows, tokens, num_warps, ACTIVATION is not None)
    local = ttgl.arange(0, rows, layout=ttgl.SliceLayout(1, layout))
    row = first_row + local
    is_row = (local < BOX_ROWS) & (row < width)
    token = first_token + ttgl.arange(0, tokens, layout=ttgl.SliceLayout(0, layout))[None, :]
    place = token * width + row[:, None]
    mask = (token < num_tokens) & is_row[:, None]
    if residual is not None:
        # `residual` may be `out`: each element is read and written by this program alone.
        added = ttgl.load(residual + place, mask=mask, other=0.0).to(ttgl.float32)
    if ACTIVATION is None:
        result = ttgl.convert_layout(product, layout)
        if bias is not None:
            result += ttgl.load(bias + row, mask=is_row, other=0.0).to(ttgl.float32)[:, None]
        result = result.to(dtype)
    else:
        gate, up = _split_pairs(product, num_warps)
        if bias is not None:
            gate += ttgl.load(bias + row, mask=is_row, other=0.0).to(ttgl.float32)[:, None]
            up += ttgl.load(bias + width + row, mask=is_row, other=0.0).to(ttgl.float32)[:, None]
        gate = _active(gate.to(dtype).to(ttgl.float32), ACTIVATION).to(dtype).to(ttgl.float32)
        result = (gate * up.to(dtype).to(ttgl.float32)).to(dtype)
    if residual is not None:
        result = (result.to(ttgl.float32) + added).to(dtype)
    ttgl.store(out + place, result, mask=mask)


@gluon.jit  # type: ignore[untyped-decorator]
def load_turns(
    positions: ttgl.tensor,
    kv_indices: ttgl.tensor,
    table: ttgl.tensor,
    num_tokens: ttgl.tensor,
    first_token: ttgl.tensor,
    first_column: ttgl.tensor,
    TILE_ROWS: ttgl.constexpr,
    TOKENS: ttgl.constexpr,
    BOX_ROWS: ttgl.constexpr,
    HEAD_DIM: ttgl.constexpr,
    num_warps: ttgl.constexpr,
) -> ttgl.tuple:
    """Of each pair of rows and token the cosine and the sine, [pairs, TOKENS], and of each token its slot."""
    layout: ttgl.constexpr = _stored(TILE_ROWS // 2, TOKENS, num_warps, True)
    token = first_token + ttgl.arange(0, TOKENS, layout=ttgl.SliceLayout(0, layout))
    is_token = token < num_tokens
    local = ttgl.arange(0, TILE_ROWS // 2, layout=ttgl.SliceLayout(1, layout))
    line = ttgl.load(positions + token, mask=is_token, other=0) * HEAD_DIM + first_column
    place = table + line[None, :] + local[:, None]
    mask = is_token[None, :] & (local < BOX_ROWS)[:, None]
    slot = ttgl.load(kv_indices + token, mask=is_token, other=0)
    cosine = ttgl.load(place, mask=mask, other=0.0)
    return cosine, ttgl.load(place + HEAD_DIM // 2, mask=mask, other=0.0), slot


@gluon.jit  # type: ignore[untyped-decorator]
def store_heads(
    out: ttgl.tensor,
    keys: ttgl.tensor,
    values: ttgl.tensor,
    product: ttgl.tensor,
    bias: ttgl.tensor,
    turns: ttgl.tuple,
    num_tokens: ttgl.tensor,
    first_token: ttgl.tensor,
    head: ttgl.tensor,
    first_column: ttgl.tensor,
    N: ttgl.constexpr,
    BOX_ROWS: ttgl.constexpr,
    NUM_KV_HEADS: ttgl.constexpr,
    HEAD_DIM: ttgl.constexpr,
    num_warps: ttgl.constexpr,
) -> None:
    """Turned queries to `out`, turned keys and values to their slots; rounded as in `rope_kv.py`. All rows are of one head."""
    half: ttgl.constexpr = HEAD_DIM // 2
    pairs: ttgl.constexpr = product.shape[0] // 2
    tokens: ttgl.constexpr = product.shape[1]
    num_heads: ttgl.constexpr = N // HEAD_DIM - 2 * NUM_KV_HEADS
    dtype: ttgl.constexpr = out.dtype.element_ty
    layout: ttgl.constexpr = _stored(pairs, tokens, num_warps, True)
    local = ttgl.arange(0, pairs, layout=ttgl.SliceLayout(1, layout))
    is_row = local < BOX_ROWS
    column = first_column + local
    first, second = _split_pairs(product, num_warps)
    if bias is not None:
        biases = bias + head * HEAD_DIM + column
        first += ttgl.load(biases, mask=is_row, other=0.0).to(ttgl.float32)[:, None]
        second += ttgl.load(biases + half, mask=is_row, other=0.0).to(ttgl.float32)[:, None]
    first = first.to(dtype).to(ttgl.float32)
    second = second.to(dtype).to(ttgl.float32)
    if head < num_heads + NUM_KV_HEADS:
        cosine, sine = turns[0].to(dtype).to(ttgl.float32), turns[1].to(dtype).to(ttgl.float32)
        # The first product is rounded before the second is added, as `apply_rope` does.
        turned_first = (first * cosine).to(dtype).to(ttgl.float32) - second * sine
        second = (second * cosine).to(dtype).to(ttgl.float32) + first * sine
        first = turned_first
    token = first_token + ttgl.arange(0, tokens, layout=ttgl.SliceLayout(0, layout))
    mask = (token < num_tokens)[None, :] & is_row[:, None]
    if head < num_heads:
        place = out + (token * num_heads + head)[None, :] * HEAD_DIM + column[:, None]
        ttgl.store(place, first.to(dtype), mask=mask)
        ttgl.store(place + half, second.to(dtype), mask=mask)
    else:
        line = (turns[2] * NUM_KV_HEADS + (head - num_heads) % NUM_KV_HEADS) * HEAD_DIM
        cache = keys
        if head >= num_heads + NUM_KV_HEADS:
            cache = values
        place = cache + line[None, :] + column[:, None]
        ttgl.store(place, first.to(dtype), mask=mask)
        ttgl.store(place + half, second.to(dtype), mask=mask)
