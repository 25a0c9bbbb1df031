"""Tries out whether a model run over the paged cache gives the logits that it gives on its own. It knows no architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hotgraph_server.models.interface import KvTensors, Model, StepTensors

# Two texts, fed as (tokens of the first, tokens of the second) in each step: prompts in chunks, chunk and decode row
# together, decode rows of different lengths.
_STEPS = ((7, 4), (5, 1), (1, 1), (1, 1))
_BLOCK_SIZE = 4
_BLOCKS = ((5, 2, 7, 4), (3, 6))

# Largest difference of the logits, of the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 5e-2


def agrees(
    model: Model,
    forward: Callable[[StepTensors, KvTensors], torch.Tensor],
    own_logits: Callable[[torch.Tensor], torch.Tensor],
) -> bool:
    """Feeds two short texts to `forward` step by step, and compares with `own_logits` of the whole texts.

    model: gives the layout of the cache, dtype, device and vocabulary. own_logits: int64 [tokens] to float32 [tokens,
    vocabulary]. Costs about six forwards over a dozen tokens.
    """
    texts = [
        (torch.arange(1, 1 + sum(counts)) * step % min(model.vocabulary_size, 997)).to(model.device)
        for counts, step in zip(zip(*_STEPS, strict=True), (31, 17), strict=True)
    ]
    expected = [own_logits(text) for text in texts]
    kv = _empty_cache(model)
    lengths = [0, 0]
    largest = max(float(logits.abs().max()) for logits in expected)
    limit = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE) * largest
    for counts in _STEPS:
        order = sorted((0, 1), key=lambda row: counts[row] > 1)  # decode rows first
        step = _step(texts, lengths, counts, order)
        logits = forward(step, kv)
        for row, index in enumerate(order):
            lengths[index] += counts[index]
            difference = (logits[row] - expected[index][lengths[index] - 1]).abs().max()
            if not float(difference) <= limit:  # not a number is a difference
                return False
    return True


def _empty_cache(model: Model) -> KvTensors:
    def tensor(num_heads: int, size: int) -> torch.Tensor:
        return torch.zeros(8, _BLOCK_SIZE, num_heads, size, dtype=model.dtype, device=model.device)

    return KvTensors(
        [tensor(layer.num_heads, layer.key_dim) for layer in model.kv_layout],
        [tensor(layer.num_heads, layer.value_dim) for layer in model.kv_layout],
        _BLOCK_SIZE,
    )


def _step(texts: list[torch.Tensor], lengths: list[int], counts: tuple[int, ...], order: list[int]) -> StepTensors:
    device = texts[0].device
    positions = [list(range(lengths[index], lengths[index] + counts[index])) for index in order]
    slots = [
        _BLOCKS[index][position // _BLOCK_SIZE] * _BLOCK_SIZE + position % _BLOCK_SIZE
        for index, row in zip(order, positions, strict=True)
        for position in row
    ]
    ends = [lengths[index] + counts[index] for index in order]
    starts = [0, counts[order[0]], counts[order[0]] + counts[order[1]]]
    tables = [list(_BLOCKS[index]) + [0] * (len(_BLOCKS[0]) - len(_BLOCKS[index])) for index in order]
    return StepTensors(
        token_ids=torch.cat([texts[index][row] for index, row in zip(order, positions, strict=True)]),
        positions=torch.tensor([position for row in positions for position in row], device=device),
        kv_indices=torch.tensor(slots, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        context_lens=torch.tensor(ends, dtype=torch.int32, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        last_indices=torch.tensor([starts[1] - 1, starts[2] - 1], device=device),
        query_lens=[counts[index] for index in order],
        host_context_lens=ends,
        num_decode_rows=sum(counts[index] == 1 for index in order),
    )
