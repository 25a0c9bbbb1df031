"""What the CUDA backend needs of torch: the device, streams as torch sees them, and a pool of memory. It captures nothing.

Only documented calls of torch, but for the raw handle of the current stream, which compiled kernels ask for in the same way.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

import torch

WARM_UP_SIZE = 64  # rows and columns of the matrices that make cuBLAS allocate its workspaces
WARM_UP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Torch(Protocol):
    """What the backend asks of torch: the seam that tests put a fake behind. All of it is called on the capture thread."""

    def open(self) -> None:
        """Makes the device current on this thread, and the pools. Raises RuntimeError where there is no such device."""
        ...

    def close(self) -> None:
        """Lets go of the pools. Only once no graph that was recorded in it is launched any more."""
        ...

    def keep_pool(self) -> None:
        """Never gives the pools' memory back, not even at the end: on a lost device the attempt would end the process."""
        ...

    def on_stream(self, stream: int) -> AbstractContextManager[None]:
        """Work goes to this stream, without gradients, with memory as usual."""
        ...

    def recording(self, stream: int, *, is_rehearsal: bool = False) -> AbstractContextManager[None]:
        """The same, with this thread's memory from the pool; that of a rehearsal from another, since graphs run meanwhile."""
        ...

    def warm_libraries(self) -> None:
        """Has cuBLAS and cuBLASLt allocate what they keep for this thread and the current stream."""
        ...

    def current_stream(self) -> Callable[[], int]:
        """What returns the handle of the calling thread's current stream."""
        ...

    def pool_bytes(self) -> int:
        """Device memory in the pool."""
        ...

    def reserved_bytes(self) -> int:
        """Device memory that torch holds in this process, the pool's included."""
        ...

    def clear_last_error(self) -> None:
        """Makes torch's copy of the runtime forget a failed call of this thread, which a later launch might report."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool: ...


class TorchDevice:
    """The real one. `device`: None, or "cuda" without a number, is the one a new thread starts on: the first."""

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        self._device = device
        self._index = 0
        self._pool: torch.cuda.MemPool | None = None
        self._rehearsal_pool: torch.cuda.MemPool | None = None

    def open(self) -> None:
        if torch.cuda.get_allocator_backend() != "native":
            raise RuntimeError("torch's own allocator is needed: another has no pools that outlive a capture")
        device = torch.device("cuda" if self._device is None else self._device)
        if device.type != "cuda":
            raise RuntimeError(f"a CUDA device is needed, not {device}")
        self._index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_device(self._index)
        # Kept to the end: a pool whose last reference goes returns its memory, which the graphs still point at.
        self._pool = torch.cuda.MemPool()
        self._rehearsal_pool = torch.cuda.MemPool()

    def close(self) -> None:
        self._pool = self._rehearsal_pool = None

    def keep_pool(self) -> None:
        for pool in (self._pool, self._rehearsal_pool):
            if pool is not None:
                # One reference more than anybody will let go of: its destructor frees memory, and may not fail.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        external = torch.cuda.ExternalStream(stream, device=self._index)  # type: ignore[no-untyped-call]  # torch's gap
        with torch.cuda.stream(external), torch.inference_mode():
            yield

    @contextmanager
    def recording(self, stream: int, *, is_rehearsal: bool = False) -> Iterator[None]:
        pool = self._rehearsal_pool if is_rehearsal else self._pool
        assert pool is not None, "the device is not open"
        with self.on_stream(stream), torch.cuda.use_mem_pool(pool, self._index):
            yield

    def warm_libraries(self) -> None:
        for dtype in WARM_UP_DTYPES:
            matrix = torch.ones(WARM_UP_SIZE, WARM_UP_SIZE, device=self._index, dtype=dtype)
            torch.matmul(matrix, matrix)  # cuBLAS
            torch.bmm(matrix[None], matrix[None])
            torch.addmm(matrix[0], matrix, matrix)  # cuBLASLt, for the bias

    def current_stream(self) -> Callable[[], int]:
        return partial(torch._C._cuda_getCurrentRawStream, self._index)

    def pool_bytes(self) -> int:
        assert self._pool is not None, "the device is not open"
        segments = self._pool.snapshot(include_traces=False)  # type: ignore[no-untyped-call]  # torch's gap
        return sum(int(segment["total_size"]) for segment in segments)

    def reserved_bytes(self) -> int:
        stats = torch.cuda.memory_stats_as_nested_dict(self._index)
        return int(stats["reserved_bytes"]["all"]["current"])

    def clear_last_error(self) -> None:
        major = (torch.version.cuda or "").split(".")[0]
        try:
            loaded = ctypes.CDLL(f"libcudart.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            return  # torch holds its runtime inside; its own checks clear what they report, and that must do
        loaded.cudaGetLastError()

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError)
