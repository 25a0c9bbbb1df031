"""Which tokens sampling may choose: top-k, top-p and min-p, as one threshold a row on its scaled logits.

Top-k keeps the k largest; top-p keeps, of those, the smallest set whose probability reaches p of theirs; min-p drops what is
less likely than min_p times the likeliest. Each is "at least this logit", so the three together are the largest of three
thresholds. Tokens of equal logits stay or go together, whatever their order.
"""

from __future__ import annotations

import torch

from hotgraph_server.kernels.row_sums import row_cumsum


def filter_threshold(
    largest: torch.Tensor,
    total: torch.Tensor,
    *,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    vocabulary_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The threshold of each row, and whether it is certain, from the row's C largest logits: float32 [R], bool [R].

    `largest`: float32 [R, C], falling. `total`: float64 [R], the sum over the whole row of exp(logit - largest logit).
    `top_k` int64 (0: all), `top_p` and `min_p` float32, all [R]. With C below the vocabulary's size a threshold is certain
    when it is above the last of `largest`: then every token that stays is among them. With C equal to it, always.
    """
    num_known = largest.shape[1]
    is_all = num_known == vocabulary_size
    none = torch.full_like(largest[:, 0], -torch.inf)
    first = largest[:, 0]

    has_top_k = (top_k > 0) & (top_k < vocabulary_size)
    is_k_known = top_k <= num_known
    kth = largest.gather(1, (top_k.clamp(1, num_known) - 1).unsqueeze(1)).squeeze(1)
    k_threshold = torch.where(has_top_k & is_k_known, kth, none)

    # The running sum of probabilities is in float64: near p = 1 float32 would never reach it.
    weights = torch.exp((largest - first.unsqueeze(1)).to(torch.float64))
    weights = torch.where(largest >= k_threshold.unsqueeze(1), weights, 0.0)
    sums = row_cumsum(weights)
    goal = top_p * torch.where(has_top_k & is_k_known, sums[:, -1], total)
    reached_at = torch.searchsorted(sums, goal.unsqueeze(1))  # the first place whose sum is at least the goal
    is_reached = reached_at.squeeze(1) < num_known
    p_threshold = largest.gather(1, reached_at.clamp_(max=num_known - 1)).squeeze(1)
    has_top_p = top_p < 1
    p_threshold = torch.where(has_top_p & is_reached, p_threshold, none)

    m_threshold = first + torch.log(min_p)  # log(0) is minus infinity: keeps all
    threshold = torch.maximum(torch.maximum(k_threshold, p_threshold), m_threshold)
    if is_all:
        return threshold, torch.ones_like(has_top_k)
    # Where more than C tokens pass top-k, the sum that p is a part of is not known.
    is_certain = (threshold > largest[:, -1]) & ~(has_top_k & ~is_k_known & has_top_p)
    return threshold, is_certain
