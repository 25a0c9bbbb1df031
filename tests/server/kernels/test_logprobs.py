"""kernels/logprobs.py against log-softmax in float64."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.kernels.logprobs import token_logprobs


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_equals_log_softmax(num_top: int) -> None:
    """The chosen tokens' and the likeliest tokens' logarithms are those of the softmax, likeliest first."""
    logits = torch.randn(6, 500) * 8
    chosen = torch.randint(0, 500, (6,))
    expected = torch.log_softmax(logits.double(), dim=1)
    chosen_logprobs, top_ids, top_logprobs = token_logprobs(logits, chosen, num_top)
    torch.testing.assert_close(chosen_logprobs.double(), expected[torch.arange(6), chosen], rtol=1e-5, atol=1e-5)
    assert top_ids.shape == top_logprobs.shape == (6, num_top)
    torch.testing.assert_close(top_logprobs.double(), expected.topk(num_top).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(top_ids, expected.topk(num_top).indices)
