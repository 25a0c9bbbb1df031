"""What all tests share: the embedded model, fetched once into the user's own cache."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hotgraph_server.models import registry

# A shell that runs the tests in the background has them ignore Ctrl-C, and so every program that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder. Tests that use it are marked `model`."""
    return registry.pull("smollm2-135m-instruct")
