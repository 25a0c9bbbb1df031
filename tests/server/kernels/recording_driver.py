"""A driver for Triton that says what was launched, where there is no GPU: kernels are compiled for Hopper, and do not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]  # it comes without types
from triton.runtime import driver  # type: ignore[import-untyped]  # as above

STREAM = 7


class RecordingDriver:
    """What Triton asks of a driver. `launches`: grid, stream and arguments of each."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.utils = self

    def launcher_cls(self, source: object, metadata: object) -> Any:
        def run(*arguments: Any) -> None:
            x, y, z, stream, _function, _packed, _metadata, _enter, _leave, *values = arguments
            self.launches.append((x, y, z, stream, *(_told(value) for value in values)))

        return run

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 2, 64, 0, 1024  # module, function, registers, spills, threads


def _told(value: Any) -> Any:
    """A launch's argument as the device would see it."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if hasattr(value, "base"):
        return value.base.data_ptr(), tuple(value.shape), tuple(value.strides), value.padding
    return value


@contextmanager
def recording(*kernels: Any) -> Iterator[RecordingDriver]:
    """Meanwhile launches are recorded. What `kernels` were compiled to is forgotten afterwards: it cannot run."""
    recorder = RecordingDriver()
    before = driver._active  # asking for the active one makes one, which there is none of without a GPU
    driver.set_active(recorder)
    try:
        yield recorder
    finally:
        driver._active = before
        for kernel in kernels:
            kernel.device_caches.clear()
