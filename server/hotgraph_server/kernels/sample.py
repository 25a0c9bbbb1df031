"""The next token of each row, from logits that penalties and bias have already changed. Three functions, by what they can do.

Gumbel-max: the argmax of logits / temperature + Gumbel noise is a draw from their softmax. Temperature 0 takes the argmax of
the logits instead. Of equal scores the smallest token id wins.

On the CPU rows are sorted by what they need and only that is computed; on a device nothing depends on a value read back. Both
give the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hotgraph_server.kernels.filters import filter_threshold
from hotgraph_server.kernels.noise import gumbel_noise
from hotgraph_server.kernels.row_sums import row_logsumexp

_NUM_CANDIDATES = (64, 1024)  # how many of the largest logits are tried before the whole row is sorted


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How each of R rows is sampled.

    `temperature`, `top_p`, `min_p`: float32 [R]; `top_k`: int64 [R], 0 for all; `seeds`: int64 [R, 2], low and high 32 bits;
    `positions`: int64 [R], the index in the sequence of the token that is sampled.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor

    def take(self, rows: torch.Tensor) -> RowSampling:
        """Those rows only (int64 indices)."""
        return RowSampling(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.seeds[rows],
            self.positions[rows],
        )


def row_peaks(logits: torch.Tensor) -> torch.Tensor:
    """Each row's largest logit: float32 [R], for float32 [R, V]. The row can be sampled from when that is finite.

    It is NaN when any logit is; a model may mask tokens of its own with minus infinity.
    """
    return logits.amax(dim=1)


def sample_greedy(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row: int64 [R], for float32 [R, V]."""
    return logits.argmax(dim=1)


def sample_gumbel(logits: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    """Temperature only; filters of `sampling` are not looked at. int64 [R], for float32 [R, V]."""
    if logits.device.type != "cpu":
        return _gumbel_blind(logits, sampling)
    is_greedy = sampling.temperature == 0
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64)
    for rows, function in ((is_greedy, _greedy), (~is_greedy, _gumbel)):
        _fill(token_ids, logits, sampling, rows, function)
    return token_ids


def sample_filtered(logits: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    """Temperature, top-k, top-p and min-p. int64 [R], for float32 [R, V]."""
    if logits.device.type != "cpu":
        return _filtered_blind(logits, sampling)
    is_greedy = sampling.temperature == 0
    is_plain = (sampling.top_k == 0) & (sampling.top_p >= 1) & (sampling.min_p <= 0)
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64)
    for rows, function in (
        (is_greedy, _greedy),
        (~is_greedy & is_plain, _gumbel),
        (~is_greedy & ~is_plain, _filtered),
    ):
        _fill(token_ids, logits, sampling, rows, function)
    return token_ids


def _gumbel_blind(logits: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    """`sample_gumbel` for a device: reads nothing back."""
    noise = gumbel_noise(sampling.seeds, sampling.positions, logits.shape[1])
    noise = torch.where((sampling.temperature == 0).unsqueeze(1), 0.0, noise)
    return noise.add_(_scale(logits, sampling)).argmax(dim=1)


def _filtered_blind(logits: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    """`sample_filtered` for a device: reads nothing back."""
    return torch.where(sampling.temperature == 0, sample_greedy(logits), _filtered_by_sort(logits, sampling))


def _fill(
    token_ids: torch.Tensor,
    logits: torch.Tensor,
    sampling: RowSampling,
    is_row: torch.Tensor,
    function: Callable[[torch.Tensor, RowSampling], torch.Tensor],
) -> None:
    """Runs `function` on the rows where `is_row`, and puts its result into their `token_ids`."""
    rows = is_row.nonzero().squeeze(1)
    if len(rows) == len(token_ids):
        token_ids.copy_(function(logits, sampling))
    elif len(rows):
        token_ids[rows] = function(logits[rows], sampling.take(rows))


def _scale(logits: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    """Logits over temperature; those of greedy rows as they are."""
    divisor = torch.where(sampling.temperature == 0, 1.0, sampling.temperature)
    return logits / divisor.unsqueeze(1)


def _greedy(logits: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    return sample_greedy(logits)


def _gumbel(logits: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    noise = gumbel_noise(sampling.seeds, sampling.positions, logits.shape[1])
    return noise.add_(_scale(logits, sampling)).argmax(dim=1)


def _filtered(logits: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    """Tries with the largest few logits, which nearly always hold all that may be chosen; sorts only the rows left over."""
    num_rows, vocabulary_size = logits.shape
    scaled = _scale(logits, sampling)
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    total = torch.exp((scaled.logsumexp(dim=1) - scaled.amax(dim=1)).to(torch.float64))
    pending = torch.arange(num_rows)
    for num_candidates in _NUM_CANDIDATES:
        if num_candidates >= vocabulary_size:
            break
        rows = sampling.take(pending)
        largest, candidate_ids = torch.topk(scaled[pending], num_candidates, dim=1)
        threshold, is_certain = filter_threshold(
            largest,
            total[pending],
            top_k=rows.top_k,
            top_p=rows.top_p,
            min_p=rows.min_p,
            vocabulary_size=vocabulary_size,
        )
        noise = gumbel_noise(rows.seeds, rows.positions, vocabulary_size, candidate_ids)
        scores = (largest + noise).masked_fill_(largest < threshold.unsqueeze(1), -torch.inf)
        is_best = scores == scores.amax(dim=1, keepdim=True)
        # Candidates stand in the order of their logits, so the smallest id among equals is looked for.
        chosen = torch.where(is_best, candidate_ids, vocabulary_size).amin(dim=1)
        token_ids[pending[is_certain]] = chosen[is_certain]
        pending = pending[~is_certain]
        if not len(pending):
            return token_ids
    token_ids[pending] = _filtered_by_sort(logits[pending], sampling.take(pending))
    return token_ids


def _filtered_by_sort(logits: torch.Tensor, sampling: RowSampling) -> torch.Tensor:
    """The slow way that always works, and reads nothing back."""
    vocabulary_size = logits.shape[1]
    scaled = _scale(logits, sampling)
    largest = _sorted_down(scaled)
    total = torch.exp((row_logsumexp(scaled) - largest[:, 0]).to(torch.float64))
    threshold, _ = filter_threshold(
        largest,
        total,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        vocabulary_size=vocabulary_size,
    )
    scores = gumbel_noise(sampling.seeds, sampling.positions, vocabulary_size).add_(scaled)
    return scores.masked_fill_(scaled < threshold.unsqueeze(1), -torch.inf).argmax(dim=1)


def _sorted_down(values: torch.Tensor) -> torch.Tensor:
    """Each row's values, falling. NumPy's sort is vectorised and takes a tenth of the time of torch's on the CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1)).flip(1)
    return values.sort(dim=1, descending=True).values
