"""What stands behind a product in its kernel, as the kernels of `few_rows.py` and `tile_rows.py` are told. It launches nothing.

An epilogue is made anew for each launch, so it is a tuple of dicts, which cost the host least.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from hotgraph_server.kernels.rope import RopePlan

PDL_OPTIONS: Final[dict[bool, dict[str, bool]]] = {False: {}, True: {"launch_pdl": True}}
"""Triton's options for a link of a chain, or for none. Named only where it is wanted: the interpreter does not know it."""


class Epilogue(NamedTuple):
    """What a kernel does with a product: arguments of its own, by their names."""

    tensors: dict[str, torch.Tensor | None]
    constants: dict[str, Any]


def num_outputs_of(weight: torch.Tensor, activation: str | None) -> int:
    """Of each row of x: as many as the weight has rows, or half of that if they are gated."""
    return weight.shape[0] if activation is None else weight.shape[0] // 2


def linear_epilogue(weight: torch.Tensor, activation: str | None, residual: torch.Tensor | None) -> Epilogue:
    """Gated, if there is an activation, and added to the residual, if there is one."""
    return Epilogue(
        {
            "residual": residual,
            "positions": None,
            "kv_indices": None,
            "table": None,
            "keys": None,
            "values": None,
        },
        {
            "ACTIVATION": "silu" if activation == "swish" else activation,
            "DISTANCE": 0 if activation is None else num_outputs_of(weight, activation),
            "NUM_KV_HEADS": 0,
            "HEAD_DIM": 0,
        },
    )


def heads_epilogue(rope: RopePlan, kv_indices: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Epilogue:
    """Queries and keys turned, and keys and values written to the cache: see `few_rows_qkv`."""
    num_kv_heads, head_dim = keys.shape[2:]
    assert keys.is_contiguous(), "the cache is contiguous"
    assert values.is_contiguous(), "the cache is contiguous"
    assert rope.table.shape[1] == head_dim, "heads are turned whole"
    return Epilogue(
        {
            "residual": None,
            "positions": rope.positions,
            "kv_indices": kv_indices,
            "table": rope.table,
            "keys": keys,
            "values": values,
        },
        {"ACTIVATION": None, "DISTANCE": head_dim // 2, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim},
    )
