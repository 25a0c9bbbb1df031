"""Tests of bench/transformers_process.py and the child behind it, with a model of a few thousand weights."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotgraph_server.bench.transformers_process import ChildError, TransformersProcess, transformers_process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, whose end of text comes up soon."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=list(range(8)),
    )
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[TransformersProcess]:
    """A running one."""
    with transformers_process(folder, 1) as process:
        yield process


def test_what_it_tells_of_itself(process: TransformersProcess) -> None:
    """It runs on the threads it was given, and names its versions."""
    assert process.facts["num_threads"] == 1
    assert process.facts["vocabulary_size"] == 16
    assert process.facts["transformers"]
    assert process.facts["torch"]


def test_every_prompt_gets_the_asked_length(process: TransformersProcess) -> None:
    """Generation goes on past the model's end of text, and is the same in a padded batch and again."""
    prompts = [[9, 10, 11], [12], [13, 14, 15, 9, 10]]
    alone = asyncio.run(process.run(prompts, 6))
    batched = asyncio.run(process.run(prompts, 6, is_batched=True))
    assert [len(ids) for ids in alone.token_ids] == [6, 6, 6]
    assert batched.token_ids == alone.token_ids
    assert asyncio.run(process.run(prompts, 6)).token_ids == alone.token_ids
    assert alone.seconds > 0
    assert alone.tokens_per_second == 18 / alone.seconds


def test_a_process_that_cannot_start_is_told(tmp_path: Path) -> None:
    """A folder that holds no model ends the child, and that is an error here."""
    with pytest.raises(ChildError, match="ended with status 1"), transformers_process(tmp_path, 1):
        pass
