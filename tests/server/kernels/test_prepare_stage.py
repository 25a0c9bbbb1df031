"""kernels/prepare_stage.py: where the words of a stage stand."""

from __future__ import annotations

import random

import torch

from hotgraph_server.kernels.prepare_stage import RECORD_WORDS, RowRecord, StageLayout


def test_parts_do_not_overlap() -> None:
    """Each word belongs to one part at most, each part begins at a multiple of 128 bytes, and parts lie where they say."""
    rng = random.Random(1)
    for _ in range(50):
        layout = StageLayout(rng.randint(1, 70), rng.randint(1, 700), rng.randint(1, 300), rng.randint(1, 20))
        stages = torch.zeros(2, layout.num_words, dtype=torch.int32)
        for part in (layout.records, layout.token_ids, layout.parameters, layout.tables):
            view = part(stages)
            view += 1
            assert view.storage_offset() % 32 == 0
        assert int(stages.max()) == 1
        assert layout.num_words % 32 == 0
        sizes = (RECORD_WORDS, layout.num_parameters, layout.max_blocks)
        assert int(stages[1].sum()) == layout.max_rows * sum(sizes) + layout.max_tokens
        assert layout.tables(stages)[1].data_ptr() == stages[1, layout.tables_at :].data_ptr()
        assert layout.parameters(stages).stride()[1] == layout.parameters_stride


def test_a_record_has_its_words() -> None:
    """A row's record fills the words that are kept for it."""
    assert len(RowRecord._fields) == RECORD_WORDS
