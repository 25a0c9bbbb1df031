"""Launches the Gluon kernel of matrix products for up to 64 rows, and knows which weights that takes.

What it gives is defined in `few_rows.py`. It is imported where there is no Triton, too; its kernel is not.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from hotgraph_server.kernels.again import launch_as, launched_again
from hotgraph_server.kernels.few_rows_triton import normed_triton
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.tile_rows_cuts import (
    COLUMNS,
    MAX_ROWS,
    SHARED_BYTES,
    SplitRoom,
    TileTuning,
    num_steps_of,
    room_for,
    tuned,
)

_PDL: dict[bool, dict[str, bool]] = {False: {}, True: {"launch_pdl": True}}  # said by name only where it is wanted


def suits(weight: torch.Tensor) -> bool:
    """Whether the kernel knows such a weight: 16 bits, in rows of a multiple of 16 numbers, from a multiple of 16 bytes on."""
    return (
        weight.dtype in {torch.float16, torch.bfloat16}
        and weight.is_contiguous()
        and weight.shape[1] % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


def tile_rows_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    normed: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    split_room: SplitRoom | None = None,
    pdl: bool = False,
    tuning: TileTuning | None = None,
    room: int | None = None,
) -> torch.Tensor:
    """`tile_rows_linear` in its kernels. A `tuning` that splits needs a `split_room` that holds it.

    room: tokens that a program has room for, a power of two from 8 to 256; x has more rows only if it is more than 64.
    """
    num_outputs = weight.shape[0] if activation is None else weight.shape[0] // 2
    if out is None:
        out = x.new_empty(len(x), num_outputs)
    if tuning is None:
        tuning = tuned(
            len(x), *weight.shape, is_gated=activation is not None, is_normed=norm is not None, split_room=split_room
        )
    if norm is not None:
        x = normed_triton(x, norm, epsilon, normed, pdl=pdl)
    _launch(
        x,
        weight,
        out,
        bias,
        tuning,
        split_room,
        room_for(len(x)) if room is None else room,
        pdl=pdl,
        residual=residual,
        positions=None,
        kv_indices=None,
        table=None,
        keys=None,
        values=None,
        ACTIVATION="silu" if activation == "swish" else activation,
        DISTANCE=0 if activation is None else num_outputs,
        NUM_KV_HEADS=0,
        HEAD_DIM=0,
    )
    return out


def tile_rows_qkv_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    rope: RopePlan,
    kv_indices: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    normed: torch.Tensor | None = None,
    split_room: SplitRoom | None = None,
    pdl: bool = False,
    tuning: TileTuning | None = None,
    room: int | None = None,
) -> torch.Tensor:
    """`tile_rows_qkv` in its kernels. A tuning's rows are of one head, so half of them divide half of a head.

    room: as in `tile_rows_linear_triton`.
    """
    num_kv_heads, head_dim = keys.shape[2:]
    assert keys.is_contiguous(), "the cache is contiguous"
    assert values.is_contiguous(), "the cache is contiguous"
    assert rope.table.shape[1] == head_dim, "heads are turned whole"
    assert head_dim % 32 == 0, "heads that fill boxes"
    if out is None:
        out = x.new_empty(len(x), len(weight) // head_dim - 2 * num_kv_heads, head_dim)
    if tuning is None:
        tuning = tuned(len(x), *weight.shape, is_gated=False, is_normed=True, head_dim=head_dim, split_room=split_room)
    if norm is not None:
        x = normed_triton(x, norm, epsilon, normed, pdl=pdl)
    _launch(
        x,
        weight,
        out,
        bias,
        tuning,
        split_room,
        room_for(len(x)) if room is None else room,
        pdl=pdl,
        residual=None,
        positions=rope.positions,
        kv_indices=kv_indices,
        table=rope.table,
        keys=keys,
        values=values,
        ACTIVATION=None,
        DISTANCE=head_dim // 2,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
    )
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    tuning: TileTuning,
    split_room: SplitRoom | None,
    room: int,
    *,
    pdl: bool,
    residual: torch.Tensor | None,
    positions: torch.Tensor | None,
    kv_indices: torch.Tensor | None,
    table: torch.Tensor | None,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    **epilogue: Hashable,
) -> None:
    is_split = tuning.splits > 1
    tensors = {
        "out": out,
        "x": x,
        "weight": weight,
        "bias": bias,
        "partials": split_room.partials if is_split and split_room is not None else None,
        "arrivals": split_room.arrivals if is_split and split_room is not None else None,
        "residual": residual,
        "positions": positions,
        "kv_indices": kv_indices,
        "table": table,
        "keys": keys,
        "values": values,
    }
    key = ("tiles", x.shape, weight.shape, tuning, room, pdl, *epilogue.values())
    if launched_again(key, tensors):
        return

    from triton.experimental.gluon.language import NVMMASharedLayout  # type: ignore[import-untyped]  # without types
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # type: ignore[import-untyped]  # as above

    from hotgraph_server.kernels.tile_rows_kernel import tiles_kernel

    num_rows, num_inputs = x.shape
    is_paired = epilogue["DISTANCE"] != 0
    num_token_blocks = -(-num_rows // room)
    assert num_rows >= 1, "rows"
    assert room in (8, 16, 32, 64, 128, 256), "a width that the tensor cores know"
    assert num_token_blocks == 1 or room > MAX_ROWS, "rows for one tile"
    assert suits(weight), "a weight as `make_linear` has it"
    assert x.is_contiguous(), "x is contiguous"
    assert x.dtype == weight.dtype, "one dtype"
    assert out.is_contiguous(), "the result is contiguous"
    num_steps = num_steps_of(tuning, num_inputs)
    num_blocks = -(-len(weight) // tuning.block_rows)
    assert min(num_steps, 2) <= tuning.num_stages <= num_steps, "a stage to fill while one is read, and none in vain"
    assert tuning.shared_bytes(room) <= SHARED_BYTES, "a ring that fits"
    assert tuning.num_warps == 4 or tuning.block_rows == 128, "64 rows for four warps"
    if tuning.splits > 1:
        assert tuning.block_rows >= 64, "what is split fills its tiles"
        assert split_room is not None, "room for what is split"
        assert split_room.holds(tuning, len(weight), room, num_token_blocks), "room for what is split"
    box_rows = tuning.block_rows // 2 if is_paired else tuning.block_rows
    # What the copy engine is told of a matrix goes to the kernel by value, so a graph keeps it.
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    arguments = {
        **tensors,
        "x": TensorDescriptor(x, [num_rows, num_inputs], [num_inputs, 1], [room, COLUMNS], layout),
        "weight": TensorDescriptor(weight, [len(weight), num_inputs], [num_inputs, 1], [box_rows, COLUMNS], layout),
        "num_tokens": num_rows,
        "N": len(weight),
        "K": num_inputs,
        "TOKENS": room,
        "TILE_ROWS": tuning.tile_rows,
        "BOX_ROWS": box_rows,
        "PARTS": tuning.parts,
        "STAGES": tuning.num_stages,
        "SPLITS": tuning.splits,
        "STEPS": num_steps,
        "PDL": pdl,
        "TRIGGERS_LATE": tuning.triggers_late,
        "num_warps": tuning.num_warps,
        **_PDL[pdl],
        **epilogue,
    }
    grid = (num_blocks, tuning.splits) if room <= MAX_ROWS else (num_token_blocks, num_blocks, tuning.splits)
    launch_as(key, tiles_kernel, grid, tensors, arguments)
