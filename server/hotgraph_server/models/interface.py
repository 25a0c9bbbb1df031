"""What a model is to the engine: a forward over static step tensors and a paged KV cache, as decoder and bridge have one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class LayerKv:
    """Shape of one layer's cache: `key_dim` and `value_dim` elements a head, for each of `num_heads` KV heads."""

    num_heads: int
    key_dim: int
    value_dim: int


@dataclass(slots=True)
class KvTensors:
    """The paged cache. For layer i: keys[i] is [num_blocks, block_size, num_heads, key_dim], values[i] alike.

    Block 0 is a scratch block that no sequence owns: padding tokens write there and nothing reads it.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    block_size: int


@dataclass(slots=True)
class StepTensors:
    """One step's inputs: T tokens (padding included) of R rows (padding included), rows one after the other.

    Decode rows (one token) come first, then prefill rows. The tensors are views of buffers allocated once; a forward reads
    them and must not keep them.

    - token_ids, positions, kv_indices: int64 [T]; kv_indices is block * block_size + offset, where the token's key goes.
    - block_tables: int32 [R, max_blocks]; entries past a row's context are 0.
    - context_lens: int32 [R]: tokens of the row in the cache after this step; 0 for padding rows.
    - query_starts: int32 [R + 1]: where each row's tokens start in T.
    - last_indices: int64 [R]: where each row's last token stands in T.

    `query_lens` and `host_context_lens` are the same lengths on the host, without padding rows, for the plain CPU kernels;
    kernels on a device must not need them.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_indices: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    last_indices: torch.Tensor
    query_lens: Sequence[int]
    host_context_lens: Sequence[int]
    num_decode_rows: int

    @property
    def num_rows(self) -> int:
        """Rows that are no padding."""
        return len(self.query_lens)


class Arena(Protocol):
    """Room for a model's intermediate results, allocated once. Only the model that made it knows what is in it.

    It serves one forward at a time; two of them let two threads run the model at once.
    """

    @property
    def num_bytes(self) -> int:
        """Bytes on the model's device."""
        ...


class Model(Protocol):
    """A causal language model with weights in place."""

    architecture: str
    runner: str  # "decoder" or "bridge"
    dtype: torch.dtype
    device: torch.device
    vocabulary_size: int
    context_length: int
    num_parameters: int
    weights_bytes: int
    kv_layout: Sequence[LayerKv]

    @property
    def is_capturable(self) -> bool:
        """Whether nothing that the host knows of a step shapes the work, so that a graph may hold it."""
        ...

    def arena(self, max_tokens: int, max_rows: int) -> Arena | None:
        """Room for steps of up to so many tokens and rows, padding included; None when this model makes its tensors as it goes.

        Raises RuntimeError when the device lacks the memory.
        """
        ...

    def forward(
        self,
        step: StepTensors,
        kv: KvTensors,
        arena: Arena | None = None,
        give_way: Callable[[float], None] | None = None,
    ) -> torch.Tensor:
        """Writes the step's keys and values into `kv`; returns the logits after each row's last token, float32 [R, vocabulary].

        No autograd, no random numbers, no host synchronisation on a CUDA device. With an arena (one of this model, or None)
        the intermediate results and the logits are views of it, valid until the next forward with that arena, and nothing that
        the host knows of the step shapes the work: T = R then says that no row has more than one token. `give_way` is called
        wherever the work may be cut, with about how many seconds the part before takes on the device, by models that know;
        infinitely many mean that it should be cut here.
        """
        ...
