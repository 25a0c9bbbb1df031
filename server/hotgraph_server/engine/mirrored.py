"""Arrays that the host writes and the device reads. On the CPU the two are one memory; nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_TORCH_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}

MAX_ROW_COPIES = 4
"""So many rows are copied one by one, more of them with the whole array: a copy costs the host the same at any size here."""


class Mirrored:
    """`host` is written with numpy; `tensor` is what kernels read, valid after `upload`. Zero at first.

    With another device than the CPU an upload copies by way of one of `num_stages` pinned buffers and does not wait. A buffer
    comes round again after so many uploads: the copy out of it must be over by then.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, device: torch.device, *, num_stages: int = 1
    ) -> None:
        torch_type = _TORCH_TYPES[np.dtype(dtype)]
        self.tensor = torch.zeros(shape, dtype=torch_type, device=device)
        self._stages: list[torch.Tensor] = []
        if device.type == "cpu":
            self.host: npt.NDArray[Any] = self.tensor.numpy()
            return
        self.host = np.zeros(shape, dtype)
        self._stages = [torch.zeros(shape, dtype=torch_type, pin_memory=True) for _ in range(num_stages)]
        self._views = [stage.numpy() for stage in self._stages]
        self._next = 0

    def upload(self, rows: Sequence[int] | None = None) -> None:
        """Makes what was written visible to kernels launched from now on. `rows`: the only ones that were written."""
        if not self._stages:
            return
        stage, view = self._stages[self._next], self._views[self._next]
        self._next = (self._next + 1) % len(self._stages)
        if rows is None or len(rows) > MAX_ROW_COPIES:
            np.copyto(view, self.host)
            self.tensor.copy_(stage, non_blocking=True)
            return
        for row in rows:
            view[row] = self.host[row]
            self.tensor[row].copy_(stage[row], non_blocking=True)
