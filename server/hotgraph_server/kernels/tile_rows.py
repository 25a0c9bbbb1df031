"""Matrix products for up to 64 rows, with what stands behind them in a layer. It knows one product, no model.

For more rows than `few_rows.py` takes the weights' bytes are still the time, but the rows no longer fit the registers that hold
loads in flight: here both come into shared memory by the copy engine of Hopper's multiprocessors, and their tensor cores read
them there. The gated activation, rope with the write to the cache, and the sum with the residual are done in the kernel of the
product; the norm before it has a small kernel of its own. A weight is [out, in] in rows, as `models/weights.py` keeps it.

The definition is that of `few_rows.py`, and on the CPU it is what runs. The kernel, in `tile_rows_kernels.py`, runs on NVIDIA's
GPUs of compute capability 9 alone: see `runs_on` and `suits`.

A product of few outputs leaves multiprocessors idle unless its sums are split among programs, which then need room to meet:
`SplitRoom`. Without one nothing is split.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache

import torch

from hotgraph_server.kernels import few_rows
from hotgraph_server.kernels.again import launch_as, launched_again
from hotgraph_server.kernels.few_rows import few_rows_qkv_reference, few_rows_reference
from hotgraph_server.kernels.jit import next_power_of_two
from hotgraph_server.kernels.rope import RopePlan

MAX_ROWS = 64
MAX_SPLITS = 4

_COLUMNS = 64
_MIN_ROOM = 16  # tokens a kernel has room for, at least
_SHARED_BYTES = 232_448  # of a multiprocessor, what one program can have
_BARRIER_BYTES = 8
_PDL: dict[bool, dict[str, bool]] = {False: {}, True: {"launch_pdl": True}}  # said by name only where it is wanted
_MULTIPROCESSORS = 132  # of an H100 or H200
# Programs from which on most of these have one.
_FEW_PROGRAMS = 90
# Inputs below which the stretches of a split sum are too short to fill a ring.
_FEW_INPUTS = 2048


@dataclass(frozen=True, slots=True)
class TileTuning:
    """How a product is cut up.

    block_rows: of the weight, a program: 16, 32, 64 or 128, in pairs 32, 64 or 128; parts: tiles of 64 columns that are waited
    for at once; num_stages: as many of these in flight, 2 at least; num_warps: 4, or 8 for 128 rows; splits: programs that
    share a sum, 1 unless block_rows is 64 or 128; triggers_late: the next kernel starts at the end of the products, not after
    the wait.
    """

    block_rows: int
    parts: int
    num_stages: int
    num_warps: int = 4
    splits: int = 1
    triggers_late: bool = True

    @property
    def tile_rows(self) -> int:
        """Of a tile as the tensor cores take it."""
        return max(self.block_rows, 64)

    def stretch(self, num_inputs: int) -> int:
        """Columns whose products one program adds up. With `splits` it is all that the order of sums depends on.

        Of sums that are split it is the same for one part and for two.
        """
        unit = _COLUMNS * (self.parts if self.splits == 1 else max(self.parts, 2))
        return -(-num_inputs // (unit * self.splits)) * unit

    def shared_bytes(self, room: int) -> int:
        """Of shared memory, with room for so many tokens."""
        tiles_bytes = self.parts * (self.tile_rows + room) * _COLUMNS * 2
        return self.num_stages * (tiles_bytes + _BARRIER_BYTES)


# With room for 16 tokens, for 32 and for 64: what was fastest, or within 1 % of it, on an H200 for a 7B Llama.
# At 64 each program reads as many bytes of x as of its weight, from the cache.
_BEST: dict[str, tuple[TileTuning, TileTuning, TileTuning]] = {
    "qkv": (
        TileTuning(64, parts=2, num_stages=4),
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=1, num_stages=6),
    ),
    "o": (
        TileTuning(64, parts=2, num_stages=6, splits=2),
        TileTuning(64, parts=2, num_stages=6, splits=2),
        TileTuning(32, parts=2, num_stages=6),
    ),
    "gate_up": (
        TileTuning(64, parts=2, num_stages=3),
        TileTuning(64, parts=2, num_stages=3),
        TileTuning(64, parts=1, num_stages=4),
    ),
    "down": (
        TileTuning(64, parts=2, num_stages=6, splits=2),
        TileTuning(64, parts=2, num_stages=6, splits=2),
        TileTuning(64, parts=2, num_stages=6, splits=2),
    ),
    "head": (
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=2, num_stages=4, triggers_late=False),
        TileTuning(64, parts=1, num_stages=6),
    ),
}


@dataclass(frozen=True, slots=True)
class SplitRoom:
    """Where programs that share a sum meet. Products that may run at the same time need one each; a chain's share one.

    partials: float32, any contents; arrivals: int32, zeros, and zeros again after each product.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def for_outputs(
        cls, num_outputs: int, device: torch.device, *, splits: int = MAX_SPLITS, num_rows: int = MAX_ROWS
    ) -> SplitRoom:
        """For weights of up to `num_outputs` rows: `splits` times `num_rows` float32 numbers for each of them.

        num_rows: of x, or what its blocks have room for together.
        """
        num_padded = -(-num_outputs // 128) * 128
        num_blocks = -(-num_rows // MAX_ROWS)
        return cls(
            torch.empty(splits * num_blocks * MAX_ROWS * num_padded, dtype=torch.float32, device=device),
            torch.zeros(num_blocks * (num_padded // 64), dtype=torch.int32, device=device),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self.partials.nbytes + self.arrivals.nbytes

    def holds(self, tuning: TileTuning, num_weight_rows: int, room: int, num_token_blocks: int = 1) -> bool:
        """Whether a product cut up so finds its place here, with room for so many tokens in each of its blocks."""
        return _holds(self.sizes, tuning, num_weight_rows, room, num_token_blocks)

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of partials and of arrivals."""
        return self.partials.numel(), self.arrivals.numel()


def _holds(
    sizes: tuple[int, int], tuning: TileTuning, num_weight_rows: int, room: int, num_token_blocks: int = 1
) -> bool:
    num_blocks = -(-num_weight_rows // tuning.block_rows) * num_token_blocks
    num_partials = num_blocks * tuning.tile_rows * room * tuning.splits
    return num_partials <= sizes[0] and num_blocks <= sizes[1]


def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs there: on NVIDIA's GPUs of compute capability 9, which alone have its instructions."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def suits(weight: torch.Tensor) -> bool:
    """Whether the kernel knows such a weight: 16 bits, in rows of a multiple of 16 numbers, from a multiple of 16 bytes on."""
    return (
        weight.dtype in {torch.float16, torch.bfloat16}
        and weight.is_contiguous()
        and weight.shape[1] % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


def can_fuse_rope(head_dim: int, num_turned: int, *, has_head_norm: bool) -> bool:
    """Whether `tile_rows_qkv` knows such heads: turned whole, not normed, and of a multiple of 32 elements."""
    return few_rows.can_fuse_rope(head_dim, num_turned, has_head_norm=has_head_norm) and head_dim % 32 == 0


def tile_rows_linear(
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
) -> torch.Tensor:
    """y = x Wᵀ + bias for M rows, x normed before and y gated or added to the residual behind: `out`, or a new tensor.

    x: [M, in], M from 1 to 64; weight: [out, in], or with `activation` [2 * out, in], gates in the first half; bias: as many
    numbers as weight has rows; norm: [in], the weight of `rms_norm` with `epsilon`; activation: see `gated_activation`;
    residual: [M, out], which may be `out`, and then is updated in place; normed: [M, in], room for the normed x, overwritten.
    On a GPU: one 16-bit dtype, contiguous, a weight that `suits`, x from a multiple of 16 bytes on; `out` is no part of x and
    may be float32.

    Sums are float32 and each is made in one order: the same input gives the same bits. A row's do not depend on the other rows,
    only on whether there are up to 16, up to 32 or up to 64, and on whether there is a `split_room` that holds the product.

    With `pdl` the kernel starts while the one queued before still runs, and lets the one queued behind start too. It waits
    before it reads x or writes; weight and norm it reads without waiting, so no kernel in flight may write those.

    Bytes: 2 * weight.numel() from memory; x once a program, from the cache.
    """
    if x.is_cuda:
        return tile_rows_linear_triton(
            x,
            weight,
            out,
            bias=bias,
            norm=norm,
            epsilon=epsilon,
            normed=normed,
            activation=activation,
            residual=residual,
            split_room=split_room,
            pdl=pdl,
        )
    result = few_rows_reference(
        x, weight, bias=bias, norm=norm, epsilon=epsilon, activation=activation, residual=residual
    )
    return result if out is None else out.copy_(result)


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
        x = few_rows.normed_triton(x, norm, epsilon, normed, pdl=pdl)
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


def tile_rows_qkv(
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
) -> torch.Tensor:
    """`tile_rows_linear` and then `rope_and_write_kv`, in the kernel of the product: the turned queries, in `out` or new.

    weight: [(query heads + 2 * KV heads) * d, in]; out: [M, query heads, d]. Which heads: see `can_fuse_rope`. The rest is as
    in those two. Bytes: the weight's, and 2 * KV heads * d * M elements written to the cache.
    """
    if x.is_cuda:
        return tile_rows_qkv_triton(
            x,
            weight,
            rope,
            kv_indices,
            keys,
            values,
            out,
            bias=bias,
            norm=norm,
            epsilon=epsilon,
            normed=normed,
            split_room=split_room,
            pdl=pdl,
        )
    query = few_rows_qkv_reference(x, weight, rope, kv_indices, keys, values, bias=bias, norm=norm, epsilon=epsilon)
    return query if out is None else out.copy_(query)


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
        x = few_rows.normed_triton(x, norm, epsilon, normed, pdl=pdl)
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


def tuned(
    num_rows: int,
    num_weight_rows: int,
    num_inputs: int,
    *,
    is_gated: bool,
    is_normed: bool,
    head_dim: int = 0,
    split_room: SplitRoom | None = None,
) -> TileTuning:
    """What a product is cut into, by the product of a 7B Llama that it is most like; head_dim: of heads to be turned.

    There are three kernels for each weight: for up to 16 rows, 32 and 64.
    """
    sizes = None if split_room is None else split_room.sizes
    return _tuned(room_for(num_rows), num_weight_rows, num_inputs, is_gated, is_normed, head_dim, sizes)


@cache  # of as many as a model has products, and asked for each of them in each step
def _tuned(
    room: int,
    num_weight_rows: int,
    num_inputs: int,
    is_gated: bool,
    is_normed: bool,
    head_dim: int,
    split_sizes: tuple[int, int] | None,
) -> TileTuning:
    if is_gated:
        name = "gate_up"
    elif is_normed:
        name = "qkv" if head_dim > 0 or num_weight_rows < 24_000 else "head"
    else:
        name = "down" if num_inputs > 8192 else "o"
    tuning = _BEST[name][(16, 32, 64).index(room)]
    # Heads whose halves no box of 64 or 32 rows divides.
    while head_dim > 0 and (head_dim // 2) % (tuning.block_rows // 2) != 0:
        tuning = _halved(tuning)
    if tuning.splits > 1 and (
        num_inputs < _FEW_INPUTS or split_sizes is None or not _holds(split_sizes, tuning, num_weight_rows, room)
    ):
        tuning = replace(tuning, splits=1)
    # Small models: few programs take fewer rows each, and no stage is requested that lies beyond the weight.
    while tuning.block_rows > 32 and num_weight_rows < tuning.block_rows * _FEW_PROGRAMS // tuning.splits:
        tuning = _halved(tuning)
    num_stages = min(tuning.num_stages, _num_steps(tuning, num_inputs))
    if not is_normed and -(-num_weight_rows // tuning.block_rows) * tuning.splits > _MULTIPROCESSORS:
        # A ring that fills a multiprocessor is best where each has one program. Of more than that, two have to fit.
        num_stages = min(num_stages, (_SHARED_BYTES // 2 - 1024) // replace(tuning, num_stages=1).shared_bytes(room))
    return replace(tuning, num_stages=num_stages)


def room_for(num_rows: int) -> int:
    """Tokens that the kernel for so many has room for: 16, 32 or 64."""
    return max(next_power_of_two(num_rows), _MIN_ROOM)


def _halved(tuning: TileTuning) -> TileTuning:
    return replace(tuning, block_rows=tuning.block_rows // 2, num_warps=4, splits=1, triggers_late=True)


def _num_steps(tuning: TileTuning, num_inputs: int) -> int:
    return tuning.stretch(num_inputs) // (_COLUMNS * tuning.parts)


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

    from hotgraph_server.kernels.tile_rows_kernels import tiles_kernel

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
    num_steps = _num_steps(tuning, num_inputs)
    num_blocks = -(-len(weight) // tuning.block_rows)
    assert min(num_steps, 2) <= tuning.num_stages <= num_steps, "a stage to fill while one is read, and none in vain"
    assert tuning.shared_bytes(room) <= _SHARED_BYTES, "a ring that fits"
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
        "x": TensorDescriptor(x, [num_rows, num_inputs], [num_inputs, 1], [room, _COLUMNS], layout),
        "weight": TensorDescriptor(weight, [len(weight), num_inputs], [num_inputs, 1], [box_rows, _COLUMNS], layout),
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
