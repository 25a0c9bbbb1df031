"""A decoder that on one prompt length writes to an address that is nobody's: what a broken kernel does to a process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hotgraph_server.kernels.jit import jit, tl
from hotgraph_server.models.decoder import Decoder
from hotgraph_server.models.interface import Arena, KvTensors, StepTensors

FATAL_PROMPT = 77


@jit()
def _wild(pointer: tl.tensor) -> None:
    tl.store(pointer + (1 << 44), 1.0)


def sabotage() -> None:
    """From now on decoders of this process do it, eagerly, to a prompt of `FATAL_PROMPT` tokens that comes alone."""
    forward = Decoder.forward

    def sabotaged(
        self: Decoder,
        step: StepTensors,
        kv: KvTensors,
        arena: Arena | None = None,
        give_way: Callable[[float], None] | None = None,
    ) -> torch.Tensor:
        logits = forward(self, step, kv, arena, give_way)
        if FATAL_PROMPT in step.query_lens:
            _wild[(1,)](logits)
        return logits

    Decoder.forward = sabotaged  # type: ignore[method-assign]
