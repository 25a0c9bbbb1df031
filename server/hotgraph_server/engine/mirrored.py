"""Arrays that the host writes and the device reads. On the CPU the two are one memory; nothing is copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_TORCH_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


class Mirrored:
    """`host` is written with numpy; `tensor` is what kernels read, valid after `upload`. Zero at first.

    With another device than the CPU `host` is pinned, so that the copy does not wait; a second upload must not overtake a
    step that still reads the first.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, device: torch.device) -> None:
        is_apart = device.type != "cpu"
        torch_type = _TORCH_TYPES[np.dtype(dtype)]
        self._staged = torch.zeros(shape, dtype=torch_type, pin_memory=is_apart)
        self.host: npt.NDArray[Any] = self._staged.numpy()
        self.tensor = torch.zeros(shape, dtype=torch_type, device=device) if is_apart else self._staged

    def upload(self) -> None:
        """Makes what was written visible to kernels launched from now on."""
        if self.tensor is not self._staged:
            self.tensor.copy_(self._staged, non_blocking=True)
