"""The ring of stages, read by the kernel in Triton's interpreter. `test_stages.py` runs this file in a process of its own."""

from __future__ import annotations

import pytest
import torch

from hotgraph_server.engine import buffers
from hotgraph_server.kernels.prepare import prepare_step_triton
from tests.server.engine.stage_checks import check_steps


@pytest.mark.parametrize("num_ahead", [0, 2])
def test_every_step_reads_its_own(num_ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plain function gives, step after step, the kernel gives."""
    monkeypatch.setattr(buffers, "prepare_step", prepare_step_triton)
    check_steps(torch.device("cpu"), seed=num_ahead, num_steps=60, num_ahead=num_ahead)
