"""What changes logits before temperature: penalties, bias, tokens that may not come yet. It works in place, row by row alike.

Order: repetition, presence, frequency, bias, bans. All tables are indexed by slot.
"""

from __future__ import annotations

import torch


def apply_penalties(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    *,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    in_prompt: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Changes `logits` (float32 [R, V]) in place.

    `row_slots`: int64 [R]. By slot: `repetition`, `presence`, `frequency` float32 [S]; `in_prompt` bool [S, V], whether a
    token stands in the prompt; `counts` int32 [S, V], how often it stands in the completion.

    Repetition divides positive and multiplies other logits of tokens in prompt or completion. Presence is subtracted once
    from tokens in the completion, frequency for each time they stand there.
    """
    # Of the vocabulary a sequence has seen little: on the CPU only that is computed.
    penalise = _penalise_seen if logits.device.type == "cpu" else _penalise_all
    penalise(logits, row_slots, repetition[row_slots], presence[row_slots], frequency[row_slots], in_prompt, counts)


def _penalise_seen(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    in_prompt: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Gathers what was seen, changes it, puts it back. Parameters are by row; how much was seen is read back."""
    row_counts = counts[row_slots]
    rows, token_ids = in_prompt[row_slots].logical_or_(row_counts).nonzero(as_tuple=True)
    seen_counts = row_counts[rows, token_ids]
    values = logits[rows, token_ids]
    factor = repetition[rows]
    values = torch.where(values > 0, values / factor, values * factor)
    values.sub_(presence[rows] * (seen_counts > 0)).sub_(frequency[rows] * seen_counts)
    logits[rows, token_ids] = values


def _penalise_all(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    in_prompt: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """The same for every token of the vocabulary; reads nothing back."""
    row_counts = counts[row_slots]
    is_present = row_counts > 0
    is_seen = is_present | in_prompt[row_slots]
    factor = repetition.unsqueeze(1)
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    torch.where(is_seen, repeated, logits, out=logits)
    logits.sub_(presence.unsqueeze(1) * is_present)
    logits.sub_(frequency.unsqueeze(1) * row_counts)


def apply_bias(
    logits: torch.Tensor, row_slots: torch.Tensor, *, bias_ids: torch.Tensor, bias_values: torch.Tensor
) -> None:
    """Adds to single logits (float32 [R, V], in place). By slot: `bias_ids` int64 [S, B], `bias_values` float32 [S, B];
    unused entries are (0, 0.0)."""
    logits.scatter_add_(1, bias_ids[row_slots], bias_values[row_slots])


def apply_bans(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    banned_ids: torch.Tensor,
    banned_until: torch.Tensor,
) -> None:
    """Makes a row's banned tokens impossible while its `positions` (int64 [R], tokens it has) is below the slot's
    `banned_until` (int64 [S]). `banned_ids`: int64 [S, B], unused entries -1. In place on float32 [R, V]."""
    ids = banned_ids[row_slots]
    is_active = (positions < banned_until[row_slots]).unsqueeze(1) & (ids >= 0)
    change = torch.zeros(ids.shape, dtype=logits.dtype, device=logits.device).masked_fill_(is_active, -torch.inf)
    logits.scatter_add_(1, ids.clamp(min=0), change)


def count_tokens(
    counts: torch.Tensor, row_slots: torch.Tensor, token_ids: torch.Tensor, is_counted: torch.Tensor
) -> None:
    """Adds one to `counts` (int32 [S, V], in place) for each row's token (int64 [R]) where `is_counted` (bool [R])."""
    counts.index_put_((row_slots, token_ids), is_counted.to(counts.dtype), accumulate=True)
