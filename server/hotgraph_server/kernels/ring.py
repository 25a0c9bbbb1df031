"""The last thing of a step: its results go into a ring in the host's memory, so that the host reads them without a copy.

It knows rows and a counter, not what the numbers mean.
"""

from __future__ import annotations

import torch

from hotgraph_server.kernels.again import launch
from hotgraph_server.kernels.jit import jit, next_power_of_two, tl


def write_ring(
    ring_ids: torch.Tensor,
    ring_values: torch.Tensor,
    counter: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Writes one step's rows into the ring's next place and counts it.

    token_ids: int64 [R]; values: float32 [2, R], of which rows may be strided. ring_ids: int64 [D, 1 + max_rows], whose first
    column takes the number of the step, that is `counter` (int64 [1]) as it was; ring_values: float32 [D, 2, max_rows]. The
    place is the number modulo D. With tensors on a device the ring is pinned memory of the host.
    """
    if token_ids.device.type == "cpu":
        place = counter % len(ring_ids)
        num_rows = len(token_ids)
        ring_ids[:, : 1 + num_rows].index_copy_(0, place, torch.cat((counter, token_ids)).unsqueeze(0))
        ring_values[:, :, :num_rows].index_copy_(0, place, values.unsqueeze(0))
        counter.add_(1)
        return
    write_ring_triton(ring_ids, ring_values, counter, token_ids, values)


def write_ring_triton(
    ring_ids: torch.Tensor,
    ring_values: torch.Tensor,
    counter: torch.Tensor,
    token_ids: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """`write_ring` in one program."""
    max_rows = ring_values.shape[2]
    launch(
        _write_ring_kernel,
        (1,),
        {
            "ring_ids": ring_ids,
            "ring_values": ring_values,
            "counter": counter,
            "token_ids": token_ids,
            "values": values,
        },
        {
            "values_stride": values.stride(0),
            "num_rows": len(token_ids),
            "MAX_ROWS": max_rows,
            "DEPTH": len(ring_ids),
            "BLOCK": next_power_of_two(max_rows),
            "num_warps": 1,
        },
    )


@jit(unspecialized=("num_rows", "values_stride"), unaligned=("token_ids", "values"))
def _write_ring_kernel(
    ring_ids: tl.tensor,
    ring_values: tl.tensor,
    counter: tl.tensor,
    token_ids: tl.tensor,
    values: tl.tensor,
    values_stride: tl.tensor,
    num_rows: tl.tensor,
    MAX_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    number = tl.load(counter)
    place = number % DEPTH
    row = tl.arange(0, BLOCK)
    is_row = row < num_rows
    tl.store(ring_ids + place * (MAX_ROWS + 1) + 1 + row, tl.load(token_ids + row, mask=is_row), mask=is_row)
    for index in tl.static_range(2):
        value = tl.load(values + index * values_stride + row, mask=is_row)
        tl.store(ring_values + (place * 2 + index) * MAX_ROWS + row, value, mask=is_row)
    tl.store(ring_ids + place * (MAX_ROWS + 1), number)
    tl.store(counter, number + 1)
