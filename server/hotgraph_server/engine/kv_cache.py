"""Sizes and allocates the paged KV cache. Who holds which block is the scheduler's business."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hotgraph_server.config import GIB, KvCacheSettings
from hotgraph_server.errors import ModelLoadError
from hotgraph_server.models.interface import KvTensors, LayerKv

CPU_SIZE_BYTES = GIB
MIN_BLOCKS = 3
"""The scratch block, and two to serve with."""


class KvCache:
    """The tensors. Blocks 0 (scratch) to `num_blocks` - 1 are for serving, and zero; those for probes, which follow, random."""

    def __init__(
        self,
        layout: Sequence[LayerKv],
        settings: KvCacheSettings,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_probe_blocks: int = 0,
        max_blocks: int | None = None,
        reserved_bytes: int = 0,
    ) -> None:
        """Unless the settings name a size there are at most `max_blocks` beside the scratch block: what all slots can hold;
        and on a GPU `reserved_bytes` are left free for others.

        Raises ModelLoadError when there is no room for the least, or the memory cannot be had.
        """
        self.block_size = settings.block_size
        self.block_bytes = block_bytes(layout, settings.block_size, dtype)
        limit_bytes = settings.size_bytes or default_size_bytes(device, reserved_bytes)
        self.num_blocks = limit_bytes // self.block_bytes - num_probe_blocks
        if settings.size_bytes is None and max_blocks is not None:
            # A model that keeps next to nothing for a token would else have millions of blocks, each with its bookkeeping.
            self.num_blocks = min(self.num_blocks, 1 + max_blocks)
        self.probe_blocks = range(self.num_blocks, self.num_blocks + num_probe_blocks)
        if self.num_blocks < MIN_BLOCKS:
            needed_bytes = (MIN_BLOCKS + num_probe_blocks) * self.block_bytes
            raise ModelLoadError(
                f"the KV cache of {limit_bytes} bytes is too small: a block of {self.block_size} tokens takes "
                f"{self.block_bytes} bytes, and at least {needed_bytes} bytes are needed (kv_cache.size_bytes)"
            )
        num_all = self.num_blocks + num_probe_blocks
        self.size_bytes = num_all * self.block_bytes

        def allocate(num_heads: int, dim: int) -> torch.Tensor:
            tensor = torch.zeros(num_all, self.block_size, num_heads, dim, dtype=dtype, device=device)
            tensor[self.num_blocks :].normal_()
            return tensor

        try:
            self.tensors = KvTensors(
                keys=[allocate(layer.num_heads, layer.key_dim) for layer in layout],
                values=[allocate(layer.num_heads, layer.value_dim) for layer in layout],
                block_size=self.block_size,
            )
        except (RuntimeError, MemoryError) as error:
            raise ModelLoadError(f"no memory for a KV cache of {self.size_bytes} bytes: {error}") from error

    def context_length(self, model_context_length: int) -> int:
        """Tokens one sequence may reach: what the model can do, and the blocks that exist."""
        return min(model_context_length, (self.num_blocks - 1) * self.block_size)


def block_bytes(layout: Sequence[LayerKv], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers."""
    elements = sum(layer.num_heads * (layer.key_dim + layer.value_dim) for layer in layout)
    return elements * block_size * dtype.itemsize


def default_size_bytes(device: torch.device, reserved_bytes: int = 0) -> int:
    """1 GiB on the CPU; on a GPU nineteen twentieths of what is free once the weights are there, less what is reserved."""
    if device.type == "cpu":
        return CPU_SIZE_BYTES
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(0, free_bytes * 19 // 20 - reserved_bytes)
