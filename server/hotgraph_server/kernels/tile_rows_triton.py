"""Launches the Gluon kernel of matrix products in one order, and knows which weights that takes.

What it gives is defined in `few_rows.py`. It is imported where there is no Triton, too; its kernel is not.
"""

from __future__ import annotations

import torch

from hotgraph_server.kernels.again import launch_as, launched_again
from hotgraph_server.kernels.epilogue import PDL_OPTIONS, Epilogue, heads_epilogue, linear_epilogue, num_outputs_of
from hotgraph_server.kernels.few_rows_triton import normed_triton
from hotgraph_server.kernels.rope import RopePlan
from hotgraph_server.kernels.tile_rows_cuts import (
    COLUMNS,
    MAX_ROWS,
    ROOMS,
    SHARED_BYTES,
    TileTuning,
    room_for,
    tuned,
)


def suits(weight: torch.Tensor) -> bool:
    """Whether the kernel knows such a weight: 16 bits, in rows of a multiple of 16 numbers, from a multiple of 16 bytes on."""
    return (
        weight.dtype in {torch.float16, torch.bfloat16}
        and weight.is_contiguous()
        and weight.shape[1] % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


def readable_rows(x: torch.Tensor, wanted: int) -> int:
    """`wanted` where the memory of x goes on for so many rows, else as many as x has. x: [M, in], contiguous.

    What stands there is multiplied and left: a result is made of one row. Told of the rows that exist, the copy engine fills
    the others with zeros itself, and takes up to a third longer for that (40 rows in room for 64 on an H200).
    """
    num_rows, num_inputs = x.shape
    if num_rows == wanted:
        return wanted
    num_elements = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return wanted if num_elements >= wanted * num_inputs else num_rows


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
    was_normed: bool = False,
    pdl: bool = False,
    tuning: TileTuning | None = None,
    room: int | None = None,
) -> torch.Tensor:
    """`tile_rows_linear` in its kernels. Neither a `tuning` nor a `room` changes a bit of the result.

    room: tokens that a program has room for, one of `ROOMS`; x has more rows only if it is more than 64.
    """
    epilogue = linear_epilogue(weight, activation, residual)
    if out is None:
        out = x.new_empty(len(x), num_outputs_of(weight, activation))
    is_normed = was_normed or norm is not None
    if tuning is None:
        tuning = tuned(len(x), *weight.shape, is_gated=activation is not None, is_normed=is_normed)
    if room is None:
        room = room_for(len(x), is_normed=is_normed)
    _launch(x, weight, out, bias, norm, epsilon, normed, epilogue, tuning, room, pdl=pdl)
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
    pdl: bool = False,
    tuning: TileTuning | None = None,
    room: int | None = None,
) -> torch.Tensor:
    """`tile_rows_qkv` in its kernels. A tuning's rows are of one head, so half of them divide half of a head.

    room: as in `tile_rows_linear_triton`.
    """
    epilogue = heads_epilogue(rope, kv_indices, keys, values)
    head_dim = epilogue.constants["HEAD_DIM"]
    assert head_dim % 32 == 0, "heads that fill boxes"
    if out is None:
        num_kv_heads = keys.shape[2]
        out = x.new_empty(len(x), len(weight) // head_dim - 2 * num_kv_heads, head_dim)
    if tuning is None:
        tuning = tuned(len(x), *weight.shape, is_gated=False, is_normed=True, head_dim=head_dim)
    if room is None:
        room = room_for(len(x), is_normed=True, head_dim=head_dim)
    _launch(x, weight, out, bias, norm, epsilon, normed, epilogue, tuning, room, pdl=pdl)
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    epsilon: float,
    normed: torch.Tensor | None,
    epilogue: Epilogue,
    tuning: TileTuning,
    room: int,
    *,
    pdl: bool,
) -> None:
    if norm is not None:
        x = normed_triton(x, norm, epsilon, normed, pdl=pdl)
    tensors = {
        "out": out,
        "x": x,
        "weight": weight,
        "bias": bias,
        **epilogue.tensors,
    }
    num_rows, num_inputs = x.shape
    num_token_blocks = -(-num_rows // room)
    num_readable = readable_rows(x, num_token_blocks * room)
    key = ("tiles", x.shape, num_readable, weight.shape, tuning, room, pdl, *epilogue.constants.values())
    if launched_again(key, tensors):
        return

    from triton.experimental.gluon.language import NVMMASharedLayout  # type: ignore[import-untyped]  # without types
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # type: ignore[import-untyped]  # as above

    from hotgraph_server.kernels.tile_rows_kernel import tiles_kernel

    is_paired = epilogue.constants["DISTANCE"] != 0
    assert num_rows >= 1, "rows"
    assert room in ROOMS, "a width that the tensor cores know"
    assert num_token_blocks == 1 or room > MAX_ROWS, "rows for one tile"
    assert suits(weight), "a weight as `make_linear` has it"
    assert x.is_contiguous(), "x is contiguous"
    assert x.dtype == weight.dtype, "one dtype"
    assert out.is_contiguous(), "the result is contiguous"
    num_steps = tuning.num_steps(num_inputs)
    num_blocks = -(-len(weight) // tuning.block_rows)
    assert min(num_steps, 2) <= tuning.num_stages <= num_steps, "a stage to fill while one is read, and none in vain"
    assert tuning.shared_bytes(room) <= SHARED_BYTES, "a ring that fits"
    assert tuning.num_warps == 4 or tuning.block_rows == 128, "64 rows for four warps"
    box_rows = tuning.block_rows // 2 if is_paired else tuning.block_rows
    # What the copy engine is told of a matrix goes to the kernel by value, so a graph keeps it.
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    arguments = {
        **tensors,
        "x": TensorDescriptor(x, [num_readable, num_inputs], [num_inputs, 1], [room, COLUMNS], layout),
        "weight": TensorDescriptor(weight, [len(weight), num_inputs], [num_inputs, 1], [box_rows, COLUMNS], layout),
        "num_tokens": num_rows,
        "N": len(weight),
        "K": num_inputs,
        "TOKENS": room,
        "TILE_ROWS": tuning.tile_rows,
        "BOX_ROWS": box_rows,
        "PARTS": tuning.parts,
        "STAGES": tuning.num_stages,
        "STEPS": num_steps,
        "PDL": pdl,
        "TRIGGERS_LATE": tuning.triggers_late,
        "num_warps": tuning.num_warps,
        **PDL_OPTIONS[pdl],
        **epilogue.constants,
    }
    grid = (num_blocks,) if room <= MAX_ROWS else (num_token_blocks, num_blocks)
    launch_as(key, tiles_kernel, grid, tensors, arguments)
