"""Natural logarithms of the model's own distribution: of the chosen token and of the likeliest ones."""

from __future__ import annotations

import torch

from hotgraph_server.kernels.row_sums import row_logsumexp


def token_logprobs(
    logits: torch.Tensor, chosen: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From raw `logits` (float32 [R, V]) and `chosen` tokens (int64 [R]).

    Returns the chosen tokens' logarithms (float32 [R]), the ids of the `num_top` likeliest tokens (int64 [R, num_top],
    likeliest first) and their logarithms (float32 [R, num_top]).
    """
    normaliser = row_logsumexp(logits).unsqueeze(1)
    chosen_logprobs = (logits.gather(1, chosen.unsqueeze(1)) - normaliser).squeeze(1)
    top_logits, top_ids = torch.topk(logits, num_top, dim=1)
    return chosen_logprobs, top_ids, top_logits - normaliser
