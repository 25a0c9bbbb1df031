"""Writes a step's keys and values to the paged cache. It knows slots of the cache, not whose they are."""

from __future__ import annotations

import torch


def write_kv(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kv_indices: torch.Tensor
) -> None:
    """Token t's key and value go to slot `kv_indices[t]` (block * block_size + offset), in place.

    key: [T, heads, key_dim], value: [T, heads, value_dim]; keys: [num_blocks, block_size, heads, key_dim], values alike,
    of the same dtype, contiguous; kv_indices: int64 [T]. Indices of real tokens differ; padding tokens share the scratch
    block, and which of them stays there is not defined.
    """
    keys.flatten(0, 1).index_copy_(0, kv_indices, key)
    values.flatten(0, 1).index_copy_(0, kv_indices, value)
