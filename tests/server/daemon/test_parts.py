"""What the settings name is what is built."""

from __future__ import annotations

from pathlib import Path

from hotgraph_server.daemon import build_parts
from hotgraph_server.text import ByteTokenizer
from tests.integration.harness import settings


async def test_fake_source_builds_an_engine_over_bytes(folder: Path) -> None:
    """The settings' sizes are the engine's, and every slot can hold a whole context."""
    asked = settings(folder, scheduler={"num_slots": 3})
    parts = await build_parts(asked, clock=None)  # type: ignore[arg-type]
    assert isinstance(parts.tokenizer, ByteTokenizer)
    assert parts.model_id == "fake"
    info = parts.engine.info
    assert (info.num_slots, info.context_length, info.max_step_tokens) == (3, 1024, 512)
    assert (info.num_blocks - 1) * info.block_size >= 3 * 1024
