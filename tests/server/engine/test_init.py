"""The room's public names."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hotgraph_server.engine as engine


def test_fake_engine_needs_no_torch() -> None:
    """Importing the room and the fake engine does not import torch; the real engine does, when it is named."""
    code = (
        "import sys; from hotgraph_server.engine import FakeEngine; assert 'torch' not in sys.modules;"
        "from hotgraph_server.engine import TorchEngine; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_all_names_exist() -> None:
    """Every name in __all__ can be had; others are an AttributeError."""
    assert all(getattr(engine, name) is not None for name in engine.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = engine.nonsense
