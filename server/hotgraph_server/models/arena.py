"""Where a decoder's intermediate results go: tensors allocated once, of which each step takes views. It knows sizes only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hotgraph_server.models.shape import DecoderShape


@dataclass(frozen=True, slots=True)
class Activations:
    """Views for M tokens, contiguous, of the model's dtype; None: the operation makes its own tensor.

    hidden, normed, update: [M, hidden]; qkv: [M, (heads + 2 * KV heads) * d]; query, attended: [M, heads, d];
    gate_up: [M, 2 * intermediate]; gated: [M, intermediate].
    """

    hidden: torch.Tensor | None = None
    normed: torch.Tensor | None = None
    qkv: torch.Tensor | None = None
    query: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    update: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    gated: torch.Tensor | None = None


class DecoderArena:
    """An `Arena` (see models/interface.py) for steps of up to `max_tokens` tokens and `max_rows` rows."""

    def __init__(
        self,
        shape: DecoderShape,
        *,
        max_tokens: int,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises RuntimeError when the device lacks the memory."""
        # The last layer goes on with one token a row, and padding rows may outnumber the tokens.
        capacity = max(max_tokens, max_rows)

        def room(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self._hidden = room(capacity, shape.hidden_size)
        self._normed = room(capacity, shape.hidden_size)
        self._update = room(capacity, shape.hidden_size)
        self._qkv = room(capacity, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim)
        self._query = room(capacity, shape.num_heads, shape.head_dim)
        self._attended = room(capacity, shape.num_heads, shape.head_dim)
        self._gate_up = room(capacity, 2 * shape.intermediate_size)
        self._gated = room(capacity, shape.intermediate_size)
        self._last_hidden = room(max_rows, shape.hidden_size)
        self._last_attended = room(max_rows, shape.num_heads, shape.head_dim)
        self._logits = room(max_rows, shape.vocabulary_size, dtype=torch.float32)

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        rooms = [room for room in vars(self).values() if isinstance(room, torch.Tensor)]
        return sum(room.nbytes for room in rooms)

    def tokens(self, num_tokens: int) -> Activations:
        """For all tokens of a step."""
        assert num_tokens <= len(self._hidden), "the step is larger than the arena"
        return Activations(
            hidden=self._hidden[:num_tokens],
            normed=self._normed[:num_tokens],
            qkv=self._qkv[:num_tokens],
            query=self._query[:num_tokens],
            attended=self._attended[:num_tokens],
            update=self._update[:num_tokens],
            gate_up=self._gate_up[:num_tokens],
            gated=self._gated[:num_tokens],
        )

    def last_tokens(self, num_rows: int) -> Activations:
        """For the last token of each row, picked out of those of `tokens`: `hidden` and `attended` lie elsewhere."""
        assert num_rows <= len(self._last_hidden), "the step is larger than the arena"
        return Activations(
            hidden=self._last_hidden[:num_rows],
            normed=self._normed[:num_rows],
            attended=self._last_attended[:num_rows],
            update=self._update[:num_rows],
            gate_up=self._gate_up[:num_rows],
            gated=self._gated[:num_rows],
        )

    def logits(self, num_rows: int) -> torch.Tensor:
        """The head's product, float32 [num_rows, vocabulary]."""
        return self._logits[:num_rows]
