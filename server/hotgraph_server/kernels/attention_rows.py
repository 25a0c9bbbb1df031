"""A step's rows as the Triton kernels of attention read them, and the scratch that all its layers share."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where the splits of a row leave what they found. R rows, H query heads, S splits at most; float32 unless said otherwise.

    sums [R, H, S, value_dim]: values weighted by 2**(score - maximum); maxima and totals [R, H, S]: of scores to base 2, and of
    those weights; arrivals: int32, 0 between launches, for each row and program of its heads, how many splits are done.
    """

    sums: torch.Tensor
    maxima: torch.Tensor
    totals: torch.Tensor
    arrivals: torch.Tensor


class DeviceRows:
    """A step's rows as the kernels read them: tensors whose values may change from replay to replay, and static sizes.

    block_tables: int32 [R, max_blocks]; context_lens: int32 [R]; query_starts: int32 [R + 1]; T tokens, padding included.
    T = R says that every row has one token or is padding.
    """

    def __init__(
        self,
        *,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        query_starts: torch.Tensor,
        num_tokens: int,
        block_size: int,
    ) -> None:
        self.block_tables = block_tables
        self.context_lens = context_lens
        self.query_starts = query_starts
        self.num_tokens = num_tokens
        self.num_rows = block_tables.shape[0]
        self.block_size = block_size
        self._scratch: dict[tuple[int, int, int], Scratch] = {}

    def scratch(self, num_heads: int, num_splits: int, value_dim: int) -> Scratch:
        """One for all layers of this shape, as they run one after the other."""
        key = (num_heads, num_splits, value_dim)
        scratch = self._scratch.get(key)
        if scratch is None:
            device, shape = self.block_tables.device, (self.num_rows, num_heads, num_splits)
            scratch = Scratch(
                sums=torch.empty(*shape, value_dim, dtype=torch.float32, device=device),
                maxima=torch.empty(shape, dtype=torch.float32, device=device),
                totals=torch.empty(shape, dtype=torch.float32, device=device),
                arrivals=torch.zeros(self.num_rows, num_heads, dtype=torch.int32, device=device),
            )
            self._scratch[key] = scratch
        return scratch
