"""kernels/filters.py against a sort in plain Python."""

from __future__ import annotations

import random

import torch

from hotgraph_server.kernels.filters import filter_threshold
from tests.server.kernels import naive_sampling

VOCABULARY = 300


def thresholds(
    logits: torch.Tensor, num_known: int, top_k: list[int], top_p: list[float], min_p: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel on the `num_known` largest logits of each row."""
    total = torch.exp(logits.double() - logits.double().amax(dim=1, keepdim=True)).sum(dim=1)
    return filter_threshold(
        logits.topk(num_known, dim=1).values,
        total,
        top_k=torch.tensor(top_k),
        top_p=torch.tensor(top_p, dtype=torch.float32),
        min_p=torch.tensor(min_p, dtype=torch.float32),
        vocabulary_size=logits.shape[1],
    )


def random_case(rng: random.Random, num_rows: int) -> tuple[torch.Tensor, list[int], list[float], list[float]]:
    """Logits from flat to peaked, and filters that are on or off each by itself."""
    scale = torch.tensor([rng.choice([0.01, 1.0, 4.0, 20.0]) for _ in range(num_rows)]).unsqueeze(1)
    logits = torch.randn(num_rows, VOCABULARY) * scale
    top_k = [rng.choice([0, 0, 1, 2, 17, 64, 65, 200, VOCABULARY, VOCABULARY + 5]) for _ in range(num_rows)]
    top_p = [rng.choice([1.0, rng.uniform(0.01, 0.999)]) for _ in range(num_rows)]
    min_p = [rng.choice([0.0, rng.uniform(0.001, 0.9), 1.0]) for _ in range(num_rows)]
    return logits, top_k, top_p, min_p


def test_thresholds_keep_what_the_naive_filters_keep() -> None:
    """With all logits known the kept tokens are those of the reference, for all mixtures of filters."""
    rng = random.Random(11)
    for _ in range(40):
        logits, top_k, top_p, min_p = random_case(rng, 5)
        threshold, is_certain = thresholds(logits, VOCABULARY, top_k, top_p, min_p)
        assert bool(is_certain.all())
        for row in range(5):
            expected = naive_sampling.kept_tokens(
                logits[row].tolist(), top_k=top_k[row], top_p=top_p[row], min_p=min_p[row]
            )
            kept = set((logits[row] >= threshold[row]).nonzero().flatten().tolist())
            assert kept == expected, (top_k[row], top_p[row], min_p[row])


def test_few_candidates_give_the_same_where_they_are_certain() -> None:
    """A certain threshold from few candidates is that of all logits; filters that keep few are certain."""
    rng = random.Random(12)
    num_certain = 0
    for _ in range(60):
        logits, top_k, top_p, min_p = random_case(rng, 5)
        everything, _ = thresholds(logits, VOCABULARY, top_k, top_p, min_p)
        for num_known in (8, 64):
            threshold, is_certain = thresholds(logits, num_known, top_k, top_p, min_p)
            num_certain += int(is_certain.sum())
            assert torch.equal(threshold[is_certain], everything[is_certain])
            for row in range(5):
                if 0 < top_k[row] < num_known:
                    assert is_certain[row]
    assert num_certain > 200


def test_equal_logits_stay_together() -> None:
    """Tokens as likely as the last one that stays are not told apart by their order."""
    logits = torch.zeros(3, 20)
    logits[:, 5] = 4.0
    threshold, _ = thresholds(logits, 20, [3, 0, 0], [1.0, 0.9, 1.0], [0.0, 0.0, 0.5])
    assert [(logits[row] >= threshold[row]).sum().item() for row in range(3)] == [20, 20, 1]


def test_at_least_one_token_stays() -> None:
    """The likeliest token stays under the strictest filters."""
    logits = torch.randn(1, 50)
    threshold, _ = thresholds(logits, 50, [1], [1e-6], [1.0])
    assert (logits >= threshold).nonzero()[:, 1].tolist() == [logits.argmax().item()]


def test_banned_logits_never_come_back() -> None:
    """Minus infinity is below any threshold while something else is left."""
    logits = torch.randn(1, 50)
    logits[0, 10:] = -torch.inf
    threshold, _ = thresholds(logits, 50, [0], [0.95], [0.0])
    assert set((logits >= threshold).nonzero()[:, 1].tolist()) <= set(range(10))
