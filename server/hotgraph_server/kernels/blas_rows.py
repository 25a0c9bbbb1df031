"""Finds out for which numbers of rows cuBLAS multiplies by a weight with the bits of `tile_rows.py`. It keeps no weight.

For hundreds of rows cuBLAS is faster than the kernel of `tile_rows.py`. Mostly each of its sums is made by one program from the
first column to the last, as there, and the tensor cores add up in the same way in tiles of all sizes; for some sizes it splits
sums, which gives other bits. Nobody promises which. So it is tried, with the weight at hand and random rows: sums in another
order differ in one result of thirty to five hundred, and there are hundreds of thousands. What a call takes depends on sizes,
dtype, alignment and the library, all of which stay the same while a process runs.
"""

from __future__ import annotations

import threading

import torch

from hotgraph_server.kernels.tile_rows import tile_rows_linear

MIN_ROWS = 129
"""Up to 128 rows the kernel of `tile_rows.py` has one block of tokens and does in itself what stands around a product."""

_FINE, _COARSE = 16, 128  # sizes of steps are multiples of 16, and beyond 512 of 128, but for the largest
_SEED = 20

_found: dict[tuple[torch.device, torch.dtype, torch.Size, int], bool] = {}
_lock = threading.Lock()


def rows_to_try(max_rows: int) -> list[int]:
    """Numbers of rows, from MIN_ROWS to max_rows, that steps have."""
    fine = range(-(-MIN_ROWS // _FINE) * _FINE, min(max_rows, 512) + 1, _FINE)
    coarse = range(512 + _COARSE, max_rows + 1, _COARSE)
    return sorted({*fine, *coarse, *([max_rows] if max_rows >= MIN_ROWS else [])})


def equal_rows(weight: torch.Tensor, max_rows: int, *, was_normed: bool) -> frozenset[int]:
    """Those of `rows_to_try` for which torch.mm gives the bits of `tile_rows_linear`, by trying each once a process.

    weight: [out, in] on a GPU. It takes room for x and two results of max_rows rows, and waits for the device, about a
    millisecond for each number. Raises torch.OutOfMemoryError.
    """
    numbers = rows_to_try(max_rows)
    with _lock:
        missing = [number for number in numbers if (weight.device, weight.dtype, weight.shape, number) not in _found]
        if missing:
            generator = torch.Generator(weight.device).manual_seed(_SEED)
            size = (max(missing), weight.shape[1])
            x = torch.randn(size, dtype=weight.dtype, device=weight.device, generator=generator)
            for number in missing:
                ours = tile_rows_linear(x[:number], weight, was_normed=was_normed)
                theirs = torch.mm(x[:number], weight.t(), out=torch.empty_like(ours))
                _found[weight.device, weight.dtype, weight.shape, number] = torch.equal(ours, theirs)
        return frozenset(number for number in numbers if _found[weight.device, weight.dtype, weight.shape, number])
