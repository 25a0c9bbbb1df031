"""Ways to feed sequences to a model that must all give transformers' logits. Used for the decoder and for the bridge."""

from __future__ import annotations

import functools

import torch
from transformers import PreTrainedModel

from hotgraph_server.models.interface import Model
from tests.server.models.driver import Driver, random_tokens, reference_logits

TOLERANCE = 1e-4
"""Largest difference of logits that are about 1 in size, between float32 sums in different orders."""


def check_chunked(model: Model, reference: PreTrainedModel, *, num_tokens: int, chunk_size: int) -> None:
    """One sequence in chunks: the logits after each chunk are transformers'."""
    tokens = random_tokens(num_tokens, model.vocabulary_size, seed=1)
    expected = reference_logits(reference, tokens)
    driver = Driver(model)
    for start in range(0, num_tokens, chunk_size):
        end = min(start + chunk_size, num_tokens)
        logits = driver.step({"a": tokens[start:end]})["a"]
        torch.testing.assert_close(logits, expected[end - 1], atol=TOLERANCE, rtol=0)


def _where(name: str, step: dict[str, int], message: str) -> str:
    return f"{name} in step {step}: {message}"


def check_mixed(
    model: Model, reference: PreTrainedModel, *, num_padding_tokens: int = 0, num_padding_rows: int = 0
) -> None:
    """Rows of different lengths that join and leave: prefill, decode and mixed steps, with padding."""
    lengths = {"a": 37, "b": 5, "c": 70, "d": 1, "e": 18}
    texts = {
        name: random_tokens(length + 6, model.vocabulary_size, seed)
        for seed, (name, length) in enumerate(lengths.items())
    }
    expected = {name: reference_logits(reference, text) for name, text in texts.items()}
    position = dict.fromkeys(texts, 0)
    driver = Driver(model, num_padding_tokens=num_padding_tokens, num_padding_rows=num_padding_rows)
    steps = [
        {"a": 20},  # one chunk of a prompt
        {"a": 17, "b": 5},  # its rest beside a whole prompt
        {"a": 1, "b": 1, "c": 33},  # decode rows beside a chunk
        {"b": 1, "c": 37, "d": 1, "a": 1},  # the last chunk of a long prompt, and a prompt of one token
        {"c": 1, "a": 1, "d": 1, "b": 1},  # decode only, lengths far apart
        {"e": 18},  # prefill only, while others wait
        {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1},
        {"d": 1, "e": 2},
        {"d": 1},
    ]
    for step in steps:
        chunks = {name: texts[name][position[name] : position[name] + count] for name, count in step.items()}
        logits = driver.step(chunks)
        for name, count in step.items():
            position[name] += count
            torch.testing.assert_close(
                logits[name],
                expected[name][position[name] - 1],
                atol=TOLERANCE,
                rtol=0,
                msg=functools.partial(_where, name, step),
            )
